//! What the embedded store says of itself: one member, healthy, leader of nobody.
//!
//! In: the questions of `etcdctl member list` and `etcdctl endpoint status`. Out: constants and sizes. Never here: a
//! change of any kind.

use std::net::SocketAddr;

use etcd_client::proto::{
    PbAlarmRequest, PbAlarmResponse, PbClusterService, PbDefragmentRequest, PbDefragmentResponse, PbDowngradeRequest,
    PbDowngradeResponse, PbHashKvRequest, PbHashKvResponse, PbHashRequest, PbHashResponse, PbMaintenanceService,
    PbMember, PbMemberAddRequest, PbMemberAddResponse, PbMemberListRequest, PbMemberListResponse,
    PbMemberPromoteRequest, PbMemberPromoteResponse, PbMemberRemoveRequest, PbMemberRemoveResponse,
    PbMemberUpdateRequest, PbMemberUpdateResponse, PbMoveLeaderRequest, PbMoveLeaderResponse, PbSnapshotRequest,
    PbSnapshotResponse, PbStatusRequest, PbStatusResponse,
};
use tonic::{Request, Response, Status};

use super::{MEMBER, now, unsupported};
use crate::store::memory::MemoryStore;

/// The version of etcd whose v3 API this is a part of, and a word that says it is not etcd.
const VERSION: &str = concat!("3.4.0-conclave-embedded.", env!("CARGO_PKG_VERSION"));

#[derive(Debug, Clone)]
pub(super) struct About {
    pub(super) store: MemoryStore,
    pub(super) address: SocketAddr,
}

#[tonic::async_trait]
impl PbMaintenanceService for About {
    async fn status(&self, _request: Request<PbStatusRequest>) -> Result<Response<PbStatusResponse>, Status> {
        Ok(self.store.with(|ledger| {
            let bytes = i64::try_from(ledger.bytes()).unwrap_or(i64::MAX);
            let index = ledger.revision().unsigned_abs();
            Response::new(PbStatusResponse {
                header: now(ledger),
                version: VERSION.to_owned(),
                db_size: bytes,
                leader: MEMBER,
                raft_index: index,
                raft_term: 1,
                raft_applied_index: index,
                db_size_in_use: bytes,
                ..PbStatusResponse::default()
            })
        }))
    }

    async fn alarm(&self, _request: Request<PbAlarmRequest>) -> Result<Response<PbAlarmResponse>, Status> {
        // `etcdctl endpoint health` asks whether there are any. There never are.
        Ok(self.store.with(|ledger| Response::new(PbAlarmResponse { header: now(ledger), alarms: Vec::new() })))
    }

    async fn defragment(
        &self,
        _request: Request<PbDefragmentRequest>,
    ) -> Result<Response<PbDefragmentResponse>, Status> {
        Err(unsupported("defragmentation"))
    }

    async fn hash(&self, _request: Request<PbHashRequest>) -> Result<Response<PbHashResponse>, Status> {
        Err(unsupported("hashes"))
    }

    async fn hash_kv(&self, _request: Request<PbHashKvRequest>) -> Result<Response<PbHashKvResponse>, Status> {
        Err(unsupported("hashes"))
    }

    type SnapshotStream = tokio_stream::Empty<Result<PbSnapshotResponse, Status>>;

    async fn snapshot(&self, _request: Request<PbSnapshotRequest>) -> Result<Response<Self::SnapshotStream>, Status> {
        Err(unsupported("snapshots"))
    }

    async fn move_leader(
        &self,
        _request: Request<PbMoveLeaderRequest>,
    ) -> Result<Response<PbMoveLeaderResponse>, Status> {
        Err(unsupported("changes of leader"))
    }

    async fn downgrade(&self, _request: Request<PbDowngradeRequest>) -> Result<Response<PbDowngradeResponse>, Status> {
        Err(unsupported("downgrades"))
    }
}

#[tonic::async_trait]
impl PbClusterService for About {
    async fn member_list(
        &self,
        _request: Request<PbMemberListRequest>,
    ) -> Result<Response<PbMemberListResponse>, Status> {
        let member = PbMember {
            id: MEMBER,
            name: "embedded".to_owned(),
            client_ur_ls: vec![format!("http://{}", self.address)],
            ..PbMember::default()
        };
        let members = vec![member];
        Ok(self.store.with(|ledger| Response::new(PbMemberListResponse { header: now(ledger), members })))
    }

    async fn member_add(&self, _request: Request<PbMemberAddRequest>) -> Result<Response<PbMemberAddResponse>, Status> {
        Err(unsupported("changes of membership"))
    }

    async fn member_remove(
        &self,
        _request: Request<PbMemberRemoveRequest>,
    ) -> Result<Response<PbMemberRemoveResponse>, Status> {
        Err(unsupported("changes of membership"))
    }

    async fn member_update(
        &self,
        _request: Request<PbMemberUpdateRequest>,
    ) -> Result<Response<PbMemberUpdateResponse>, Status> {
        Err(unsupported("changes of membership"))
    }

    async fn member_promote(
        &self,
        _request: Request<PbMemberPromoteRequest>,
    ) -> Result<Response<PbMemberPromoteResponse>, Status> {
        Err(unsupported("changes of membership"))
    }
}
