//! etcd's KV service: reads, puts, deletes, transactions, compaction.
//!
//! In: etcd's requests. Out: operations of the ledger, and their results in etcd's shape. Never here: state.

use bytes::Bytes;
use etcd_client::proto::{
    PbCompactionRequest, PbCompactionResponse, PbCompare, PbDeleteRequest, PbDeleteResponse, PbKvService, PbPutRequest,
    PbPutResponse, PbRangeRequest, PbRangeResponse, PbRangeStreamResponse, PbResponseOp, PbTargetUnion, PbTxnOpRequest,
    PbTxnOpResponse, PbTxnRequest, PbTxnRequestOp, PbTxnResponse,
};
use etcd_client::{CompareOp, SortOrder, SortTarget};
use tonic::{Request, Response, Status};

use super::{lease_id, now, pair, status, text, unsupported};
use crate::store::Entry;
use crate::store::ledger::{Condition, Done, Keyspan, Ledger, MAX_OPS, Op};
use crate::store::memory::MemoryStore;

#[derive(Debug)]
pub(super) struct Kv {
    pub(super) store: MemoryStore,
}

/// How to put into etcd's shape what an operation did.
enum Shape {
    Range(PbRangeRequest),
    Put { previous: bool },
    Delete { previous: bool },
}

impl Kv {
    /// Runs one operation by itself, as a transaction without conditions.
    fn one(&self, request: PbTxnOpRequest) -> Result<PbTxnOpResponse, Status> {
        let (op, shape) = operation(PbTxnRequestOp { request: Some(request) })?;
        self.store.with(|ledger| {
            serves(&shape, ledger)?;
            let (_, done) = ledger.transact(&[], vec![op], Vec::new()).map_err(|refusal| status(&refusal))?;
            let done = done.into_iter().next().ok_or_else(|| Status::internal("an operation without a result"))?;
            shaped(&shape, done, ledger)
        })
    }
}

#[tonic::async_trait]
impl PbKvService for Kv {
    async fn range(&self, request: Request<PbRangeRequest>) -> Result<Response<PbRangeResponse>, Status> {
        match self.one(PbTxnOpRequest::RequestRange(request.into_inner()))? {
            PbTxnOpResponse::ResponseRange(answer) => Ok(Response::new(answer)),
            _ => Err(Status::internal("a range was answered with something else")),
        }
    }

    type RangeStreamStream = tokio_stream::Empty<Result<PbRangeStreamResponse, Status>>;

    async fn range_stream(
        &self,
        _request: Request<PbRangeRequest>,
    ) -> Result<Response<Self::RangeStreamStream>, Status> {
        Err(unsupported("range streams"))
    }

    async fn put(&self, request: Request<PbPutRequest>) -> Result<Response<PbPutResponse>, Status> {
        match self.one(PbTxnOpRequest::RequestPut(request.into_inner()))? {
            PbTxnOpResponse::ResponsePut(answer) => Ok(Response::new(answer)),
            _ => Err(Status::internal("a put was answered with something else")),
        }
    }

    async fn delete_range(&self, request: Request<PbDeleteRequest>) -> Result<Response<PbDeleteResponse>, Status> {
        match self.one(PbTxnOpRequest::RequestDeleteRange(request.into_inner()))? {
            PbTxnOpResponse::ResponseDeleteRange(answer) => Ok(Response::new(answer)),
            _ => Err(Status::internal("a delete was answered with something else")),
        }
    }

    async fn txn(&self, request: Request<PbTxnRequest>) -> Result<Response<PbTxnResponse>, Status> {
        let request = request.into_inner();
        let sizes = [request.compare.len(), request.success.len(), request.failure.len()];
        if sizes.into_iter().any(|size| size > MAX_OPS) {
            return Err(Status::invalid_argument("etcdserver: too many operations in txn request"));
        }
        let conditions = request.compare.into_iter().map(condition).collect::<Result<Vec<_>, _>>()?;
        let operations = |ops: Vec<PbTxnRequestOp>| -> Result<(Vec<Op>, Vec<Shape>), Status> {
            let pairs = ops.into_iter().map(operation).collect::<Result<Vec<_>, _>>()?;
            Ok(pairs.into_iter().unzip())
        };
        let (then, then_shapes) = operations(request.success)?;
        let (otherwise, otherwise_shapes) = operations(request.failure)?;
        self.store.with(|ledger| {
            then_shapes.iter().chain(&otherwise_shapes).try_for_each(|shape| serves(shape, ledger))?;
            let (succeeded, done) =
                ledger.transact(&conditions, then, otherwise).map_err(|refusal| status(&refusal))?;
            let shapes = if succeeded { then_shapes } else { otherwise_shapes };
            let responses = shapes.iter().zip(done).map(|(shape, done)| {
                shaped(shape, done, ledger).map(|response| PbResponseOp { response: Some(response) })
            });
            let responses = responses.collect::<Result<Vec<_>, _>>()?;
            Ok(Response::new(PbTxnResponse { header: now(ledger), succeeded, responses }))
        })
    }

    async fn compact(&self, request: Request<PbCompactionRequest>) -> Result<Response<PbCompactionResponse>, Status> {
        self.store.with(|ledger| {
            ledger.compact(request.into_inner().revision).map_err(|refusal| status(&refusal))?;
            Ok(Response::new(PbCompactionResponse { header: now(ledger) }))
        })
    }
}

fn operation(request: PbTxnRequestOp) -> Result<(Op, Shape), Status> {
    match request.request {
        Some(PbTxnOpRequest::RequestRange(range)) => {
            // etcdctl's "everything from the first key" begins at a zero byte, which is below every key.
            let span = Keyspan::etcd(text(range.key.clone())?, range.range_end.clone());
            Ok((Op::Read(span), Shape::Range(range)))
        }
        Some(PbTxnOpRequest::RequestPut(put)) => {
            if put.ignore_value || put.ignore_lease {
                return Err(unsupported("puts that keep the value or the lease"));
            }
            let lease = lease_id(put.lease);
            let op = Op::Put { key: text(put.key)?, value: Bytes::from(put.value), lease };
            Ok((op, Shape::Put { previous: put.prev_kv }))
        }
        Some(PbTxnOpRequest::RequestDeleteRange(delete)) => {
            let span = Keyspan::etcd(text(delete.key)?, delete.range_end);
            Ok((Op::Delete(span), Shape::Delete { previous: delete.prev_kv }))
        }
        Some(PbTxnOpRequest::RequestTxn(_)) => Err(unsupported("transactions in transactions")),
        None => Err(Status::invalid_argument("etcdserver: an operation without a request")),
    }
}

/// A read of an old revision cannot be served: only the present is kept.
fn serves(shape: &Shape, ledger: &Ledger) -> Result<(), Status> {
    let Shape::Range(range) = shape else { return Ok(()) };
    match range.revision {
        revision if revision <= 0 || revision == ledger.revision() => Ok(()),
        revision if revision > ledger.revision() => {
            Err(Status::out_of_range("etcdserver: mvcc: required revision is a future revision"))
        }
        revision if revision < ledger.compacted() => {
            Err(Status::out_of_range("etcdserver: mvcc: required revision has been compacted"))
        }
        _ => Err(unsupported("reads of old revisions")),
    }
}

fn shaped(shape: &Shape, done: Done, ledger: &Ledger) -> Result<PbTxnOpResponse, Status> {
    let header = now(ledger);
    match (shape, done) {
        (Shape::Range(range), Done::Read(entries)) => {
            Ok(PbTxnOpResponse::ResponseRange(ranged(range, entries, ledger)))
        }
        (Shape::Put { previous: wanted }, Done::Put { previous }) => {
            let prev_kv = previous.filter(|_| *wanted).map(|entry| pair(&entry));
            Ok(PbTxnOpResponse::ResponsePut(PbPutResponse { header, prev_kv }))
        }
        (Shape::Delete { previous: wanted }, Done::Delete { previous }) => {
            let deleted = previous.len() as i64;
            let prev_kvs = if *wanted { previous.iter().map(pair).collect() } else { Vec::new() };
            Ok(PbTxnOpResponse::ResponseDeleteRange(PbDeleteResponse { header, deleted, prev_kvs }))
        }
        _ => Err(Status::internal("an operation was answered with something else")),
    }
}

fn ranged(range: &PbRangeRequest, mut entries: Vec<Entry>, ledger: &Ledger) -> PbRangeResponse {
    let within = |value: i64, least: i64, most: i64| (least == 0 || value >= least) && (most == 0 || value <= most);
    entries.retain(|entry| {
        within(entry.mod_revision, range.min_mod_revision, range.max_mod_revision)
            && within(entry.create_revision, range.min_create_revision, range.max_create_revision)
    });
    match range.sort_target() {
        // They come sorted by key.
        SortTarget::Key => {}
        SortTarget::Version => entries.sort_by_key(|entry| entry.version),
        SortTarget::Create => entries.sort_by_key(|entry| entry.create_revision),
        SortTarget::Mod => entries.sort_by_key(|entry| entry.mod_revision),
        SortTarget::Value => entries.sort_by(|a, b| a.value.cmp(&b.value)),
    }
    if range.sort_order() == SortOrder::Descend {
        entries.reverse();
    }
    let count = entries.len() as i64;
    let limit = usize::try_from(range.limit).ok().filter(|limit| *limit > 0).unwrap_or(usize::MAX);
    let more = !range.count_only && entries.len() > limit;
    entries.truncate(if range.count_only { 0 } else { limit });
    if range.keys_only {
        entries.iter_mut().for_each(|entry| entry.value = Bytes::new());
    }
    PbRangeResponse { header: now(ledger), kvs: entries.iter().map(pair).collect(), more, count }
}

fn condition(compare: PbCompare) -> Result<(String, Condition), Status> {
    if !compare.range_end.is_empty() {
        return Err(unsupported("comparisons of key ranges"));
    }
    let result = CompareOp::try_from(compare.result)
        .map_err(|_| Status::invalid_argument("etcdserver: a comparison without a known result"))?;
    let holds = move |ordering: std::cmp::Ordering| match result {
        CompareOp::Equal => ordering.is_eq(),
        CompareOp::NotEqual => ordering.is_ne(),
        CompareOp::Greater => ordering.is_gt(),
        CompareOp::Less => ordering.is_lt(),
    };
    // A key that is not there has version, revisions and lease 0, as in etcd; its value equals nothing.
    let number = |field: fn(&Entry) -> i64, with: i64| -> Condition {
        Box::new(move |entry| holds(entry.map_or(0, field).cmp(&with)))
    };
    let condition: Condition = match compare.target_union {
        Some(PbTargetUnion::Version(with)) => number(|entry| entry.version, with),
        Some(PbTargetUnion::CreateRevision(with)) => number(|entry| entry.create_revision, with),
        Some(PbTargetUnion::ModRevision(with)) => number(|entry| entry.mod_revision, with),
        Some(PbTargetUnion::Lease(with)) => number(|entry| entry.lease.map_or(0, |lease| lease.0), with),
        Some(PbTargetUnion::Value(with)) => {
            Box::new(move |entry| entry.is_some_and(|entry| holds(entry.value.as_ref().cmp(with.as_slice()))))
        }
        None => return Err(Status::invalid_argument("etcdserver: a comparison without a value")),
    };
    Ok((text(compare.key)?, condition))
}
