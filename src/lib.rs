//! The contracts and the vocabulary that every part of Blixard VM Management shares.
//!
//! - [`pb`]: generated from `proto/`. Wire types are always written `pb::…`; the plain noun is the domain type.
//! - [`id`], [`vm`], [`volume`], [`job`], [`node`], [`replica`], [`time`]: the domain types, parsed from the wire once, at the edge.
//! - [`error`]: every reason an RPC fails for, and the one way to make a [`tonic::Status`] of it.
//! - [`config`]: every setting, its name in TOML, environment and flags, and what is allowed.
//! - [`sdk`]: the client that users program against.
//!
//! This crate must not know how any service works: it depends on nothing else of ours.

pub mod config;
pub mod egress;
pub mod error;
pub mod id;
pub mod job;
pub mod limits;
pub mod node;
pub mod replica;
pub mod sdk;
pub mod time;
pub mod vm;
pub mod volume;

/// Generated protobuf types, clients and servers, one module per package and version.
pub mod pb {
    #![allow(unreachable_pub, clippy::all)]

    pub mod common {
        pub mod v1 {
            tonic::include_proto!("blixard.common.v1");
        }
    }
    pub mod guest {
        pub mod v1 {
            tonic::include_proto!("blixard.guest.v1");
        }
    }
    pub mod registry {
        pub mod v1 {
            tonic::include_proto!("blixard.registry.v1");
        }
    }
    pub mod scheduler {
        pub mod v1 {
            tonic::include_proto!("blixard.scheduler.v1");
        }
    }
    pub mod vmhost {
        pub mod v1 {
            tonic::include_proto!("blixard.vmhost.v1");
        }
    }

    /// The encoded `FileDescriptorSet` of all contracts, with comments, for server reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
}
