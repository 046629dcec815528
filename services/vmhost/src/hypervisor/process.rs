//! The driver without isolation: the guest agent as a plain process of this host, which is its own image.
//!
//! For development, tests and benchmarks of the control plane. A job sees the host's files; it ends with its machine
//! because it carries the machine's marks in its environment or is a descendant of the agent.

use std::{ffi::OsString, path::PathBuf, sync::Arc};

use blixard::limits;
use blixard_chassis::Tasks;

use super::{
    ChooseError, Hypervisor, HypervisorSettings, Launch, LaunchError, Machine,
    machine::{self, Agent, Kind},
    tools,
};

const AGENT: &str = "guest agent";
const AGENT_SOCKET: &str = "agent.sock";

const KIND: Kind = Kind {
    driver: "process",
    processes: &[AGENT],
    agent: Agent::Direct(AGENT_SOCKET),
    serial: None,
    events: None,
    counters: None,
    has_children: true,
};

/// Machines that are plain processes.
pub(super) struct Process {
    program: PathBuf,
    arguments: Vec<OsString>,
    tasks: Tasks,
}

impl Process {
    /// The driver, if there is an agent to run.
    ///
    /// # Errors
    /// The agent's program is missing.
    pub(super) fn new(settings: &HypervisorSettings) -> Result<Self, ChooseError> {
        let missing = |problem: String| ChooseError::Missing { driver: KIND.driver, missing: vec![problem] };
        let Some((program, arguments)) = settings.agent_command.split_first() else {
            return Err(missing("no command for the guest agent is set".to_owned()));
        };
        let program = tools::program(program.as_ref()).ok_or_else(|| {
            let program = PathBuf::from(program);
            missing(format!("the guest agent {} is not a program (cargo build)", program.display()))
        })?;
        Ok(Self { program, arguments: arguments.to_vec(), tasks: Tasks::new() })
    }
}

#[tonic::async_trait]
impl Hypervisor for Process {
    fn name(&self) -> &'static str {
        KIND.driver
    }

    /// Its jobs have the host's network and files, whatever is said.
    fn takes_devices(&self) -> bool {
        false
    }

    fn images(&self) -> Vec<String> {
        vec![limits::DEFAULT_IMAGE.to_owned()]
    }

    async fn launch(&self, launch: &Launch) -> Result<Arc<dyn Machine>, LaunchError> {
        if launch.image != limits::DEFAULT_IMAGE {
            return Err(LaunchError::UnknownImage { image: launch.image.clone(), known: self.images() });
        }
        let (program, mut arguments) = (self.program.clone(), self.arguments.clone());
        machine::launch(KIND, launch, &self.tasks, move |starting| {
            // It runs in the machine's directory.
            arguments.extend(["--listen".into(), format!("unix:{AGENT_SOCKET}").into()]);
            starting.start(AGENT, &program, &arguments).map(drop)
        })
        .await
    }

    async fn adopt(&self, launch: &Launch) -> Result<Option<Arc<dyn Machine>>, LaunchError> {
        machine::adopt(KIND, launch, &self.tasks).await
    }

    async fn sweep(&self, launch: &Launch) -> Result<usize, LaunchError> {
        machine::sweep(launch).await
    }
}
