//! Names of things. A UUID is parsed once; a `VmId` is never a `JobId`.

use std::{fmt, str::FromStr};

use uuid::Uuid;

use crate::error::{Error, invalid};

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl $name {
            /// A new random id.
            #[must_use]
            pub fn random() -> Self {
                Self(Uuid::new_v4())
            }

            /// Parses the value of a request's field; the error names the field.
            pub fn parse(field: &str, value: &str) -> Result<Self, Error> {
                Uuid::parse_str(value).map(Self).map_err(|_| invalid(field, value, "a UUID"))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = Error;
            fn from_str(value: &str) -> Result<Self, Error> {
                Self::parse("id", value)
            }
        }
    };
}

uuid_id!(
    /// A virtual machine.
    VmId
);
uuid_id!(
    /// A job.
    JobId
);

/// A node: 1 to 63 of `a-z A-Z 0-9 - _ .`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct NodeId(String);

impl NodeId {
    /// Parses the value of a request's field; the error names the field.
    pub fn parse(field: &str, value: &str) -> Result<Self, Error> {
        if is_name(value) { Ok(Self(value.to_owned())) } else { Err(invalid(field, value, NAME_ALLOWED)) }
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What [`is_name`] allows, in words.
pub const NAME_ALLOWED: &str = "1 to 63 of a-z, A-Z, 0-9, '-', '_' and '.', beginning with a letter or digit";

/// Names of nodes and images: safe as a file name and in a URL.
#[must_use]
pub fn is_name(value: &str) -> bool {
    (1..=63).contains(&value.len())
        && value.starts_with(|c: char| c.is_ascii_alphanumeric())
        && value.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}
