//! What a run is made of.

use std::{fmt, str::FromStr};

/// Something that keeps the system from doing wrong. Each can be taken away, to see that the checks notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protection {
    /// The registry refuses the writes of a scheduler that does not lead any more.
    Epoch,
    /// A node that the registry does not hear ends its attempts.
    NodeLease,
    /// A request that is repeated takes effect once.
    Idempotency,
    /// Neither vmhost nor guest begins an attempt that it has seen, or a later one of which.
    Fence,
    /// vmhost obeys no order that was given to an earlier incarnation of its node.
    Incarnation,
    /// A report counts only at the job's current attempt.
    AttemptGuard,
    /// What runs on a lost node is given up only when the node has ended it.
    Grace,
}

impl Protection {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Epoch,
        Self::NodeLease,
        Self::Idempotency,
        Self::Fence,
        Self::Incarnation,
        Self::AttemptGuard,
        Self::Grace,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Epoch => "epoch",
            Self::NodeLease => "node-lease",
            Self::Idempotency => "idempotency",
            Self::Fence => "fence",
            Self::Incarnation => "incarnation",
            Self::AttemptGuard => "attempt-guard",
            Self::Grace => "grace",
        }
    }
}

impl fmt::Display for Protection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Protection {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let names = Self::ALL.map(Self::name).join(", ");
        Self::ALL.into_iter().find(|one| one.name() == name).ok_or_else(|| format!("it is one of {names}"))
    }
}

/// What a run is made of: the same settings give the same run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Where all chance comes from.
    pub seed: u64,
    /// How much happens before the faults stop.
    pub steps: u64,
    /// What is taken away.
    pub without: Option<Protection>,
    /// Whether the trace is printed.
    pub trace: bool,
}

impl Settings {
    /// A run of a seed.
    #[must_use]
    pub fn new(seed: u64, steps: u64) -> Self {
        Self { seed, steps, without: None, trace: false }
    }

    /// The command that repeats the run.
    #[must_use]
    pub fn command(&self) -> String {
        let without = self.without.map(|one| format!(" WITHOUT={one}")).unwrap_or_default();
        format!("make sim SEED={} STEPS={}{without} TRACE=1", self.seed, self.steps)
    }
}
