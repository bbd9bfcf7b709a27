//! Conclave's wire contracts: one module per protobuf package, their descriptors, checksums, and errors as gRPC status.
//!
//! In: the `.proto` files beside this crate. Out: generated messages, clients and servers, and [`status`].
//! Never here: behaviour. Generated types stay at the edge of the crate that speaks them.

/// `conclave.inference.v1`: applications to a router.
pub mod inference {
    /// Version 1.
    pub mod v1 {
        #![allow(clippy::all, clippy::pedantic, missing_docs, unreachable_pub)]
        tonic::include_proto!("conclave.inference.v1");
    }
}

/// `conclave.expert.v1`: a router to expert workers.
pub mod expert {
    /// Metadata of an `Exchange` call: the incarnation of the worker that the router means, in decimal. Another worker that
    /// has come to listen at the same address refuses with FAILED_PRECONDITION.
    pub const INCARNATION_METADATA: &str = "conclave-incarnation";

    /// Where `Exchange` is called.
    pub const EXCHANGE_PATH: &str = "/conclave.expert.v1.ExpertWorker/Exchange";

    /// Version 1.
    pub mod v1 {
        #![allow(clippy::all, clippy::pedantic, missing_docs, unreachable_pub)]
        tonic::include_proto!("conclave.expert.v1");
    }
}

/// `conclave.placement.v1`: the values in the store.
pub mod placement {
    /// Version 1.
    pub mod v1 {
        #![allow(clippy::all, clippy::pedantic, missing_docs, unreachable_pub)]
        tonic::include_proto!("conclave.placement.v1");
    }
}

pub mod integrity;
pub mod status;

/// The compiled descriptors of every package above, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
