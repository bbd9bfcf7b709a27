//! etcd's Lease service.
//!
//! In: etcd's requests. Out: the ledger's leases, in whole seconds. Never here: a clock of its own.

use std::time::Duration;

use etcd_client::proto::{
    PbLeaseGrantRequest, PbLeaseGrantResponse, PbLeaseKeepAliveRequest, PbLeaseKeepAliveResponse, PbLeaseLeasesRequest,
    PbLeaseLeasesResponse, PbLeaseRevokeRequest, PbLeaseRevokeResponse, PbLeaseService, PbLeaseStatus,
    PbLeaseTimeToLiveRequest, PbLeaseTimeToLiveResponse,
};
use futures::StreamExt;
use futures::stream::BoxStream;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::{lease_id, now, status};
use crate::store::LeaseId;
use crate::store::ledger::Refusal;
use crate::store::memory::MemoryStore;

#[derive(Debug)]
pub(super) struct Lease {
    pub(super) store: MemoryStore,
    pub(super) token: CancellationToken,
}

/// Rounded up, since a lease that lives 0.4 s more is not over.
fn whole_seconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis().div_ceil(1000)).unwrap_or(i64::MAX)
}

#[tonic::async_trait]
impl PbLeaseService for Lease {
    async fn lease_grant(
        &self,
        request: Request<PbLeaseGrantRequest>,
    ) -> Result<Response<PbLeaseGrantResponse>, Status> {
        let request = request.into_inner();
        let ttl = Duration::from_secs(request.ttl.max(1).unsigned_abs());
        let lease = self.store.grant_lease(lease_id(request.id), ttl).map_err(|refusal| status(&refusal))?;
        Ok(self.store.with(|ledger| {
            let ttl = ledger.lease(lease).map_or(0, |info| whole_seconds(info.ttl));
            Response::new(PbLeaseGrantResponse { header: now(ledger), id: lease.0, ttl, error: String::new() })
        }))
    }

    async fn lease_revoke(
        &self,
        request: Request<PbLeaseRevokeRequest>,
    ) -> Result<Response<PbLeaseRevokeResponse>, Status> {
        let lease = LeaseId(request.into_inner().id);
        self.store.with(|ledger| {
            if !ledger.revoke(lease) {
                return Err(status(&Refusal::Lease(lease)));
            }
            Ok(Response::new(PbLeaseRevokeResponse { header: now(ledger) }))
        })
    }

    type LeaseKeepAliveStream = BoxStream<'static, Result<PbLeaseKeepAliveResponse, Status>>;

    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<PbLeaseKeepAliveRequest>>,
    ) -> Result<Response<Self::LeaseKeepAliveStream>, Status> {
        let store = self.store.clone();
        let answers = request.into_inner().map(move |beat| {
            let lease = LeaseId(beat?.id);
            Ok(store.with(|ledger| {
                // A ttl of 0 is how etcd says that the lease is gone.
                let ttl = ledger.renew(lease, Instant::now()).map_or(0, whole_seconds);
                PbLeaseKeepAliveResponse { header: now(ledger), id: lease.0, ttl }
            }))
        });
        Ok(Response::new(answers.take_until(self.token.clone().cancelled_owned()).boxed()))
    }

    async fn lease_time_to_live(
        &self,
        request: Request<PbLeaseTimeToLiveRequest>,
    ) -> Result<Response<PbLeaseTimeToLiveResponse>, Status> {
        let request = request.into_inner();
        Ok(self.store.with(|ledger| {
            let header = now(ledger);
            let id = request.id;
            let Some(info) = ledger.lease(LeaseId(id)) else {
                return Response::new(PbLeaseTimeToLiveResponse {
                    header,
                    id,
                    ttl: -1,
                    granted_ttl: 0,
                    keys: Vec::new(),
                });
            };
            let keys = info.keys.iter().filter(|_| request.keys).map(|key| key.clone().into_bytes());
            Response::new(PbLeaseTimeToLiveResponse {
                header,
                id,
                ttl: whole_seconds(info.expires.saturating_duration_since(Instant::now())),
                granted_ttl: whole_seconds(info.ttl),
                keys: keys.collect(),
            })
        }))
    }

    async fn lease_leases(
        &self,
        _request: Request<PbLeaseLeasesRequest>,
    ) -> Result<Response<PbLeaseLeasesResponse>, Status> {
        Ok(self.store.with(|ledger| {
            let leases = ledger.leases().map(|lease| PbLeaseStatus { id: lease.0 }).collect();
            Response::new(PbLeaseLeasesResponse { header: now(ledger), leases })
        }))
    }
}
