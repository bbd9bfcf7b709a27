//! etcd's Watch service: many watches on one stream.
//!
//! In: create, cancel and progress requests. Out: events, each under its watch's number. Never here: a queue without a
//! bound. A client that does not read stops this stream's task, then its watches fall behind, and the ledger closes them.

use std::collections::HashMap;

use etcd_client::proto::{PbEvent, PbKeyValue, PbWatchRequest, PbWatchRequestUnion, PbWatchResponse, PbWatchService};
use etcd_client::{EventType, WatchFilterType};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Response, Status, Streaming};

use super::{header, now, pair, text};
use crate::store::Event;
use crate::store::ledger::{Change, Keyspan, Refusal};
use crate::store::memory::MemoryStore;

/// Messages that may wait for the network, on each stream.
const OUTBOUND: usize = 16;
const MAX_WATCHES_PER_STREAM: usize = 256;
/// A message is closed once it holds this much, so that none outgrows a client's default limit of 4 MiB by far.
const MESSAGE_BYTES: usize = 1 << 20;

#[derive(Debug)]
pub(super) struct Watch {
    pub(super) store: MemoryStore,
    pub(super) token: CancellationToken,
}

type Outbound = mpsc::Sender<Result<PbWatchResponse, Status>>;

#[tonic::async_trait]
impl PbWatchService for Watch {
    type WatchStream = ReceiverStream<Result<PbWatchResponse, Status>>;

    async fn watch(&self, request: Request<Streaming<PbWatchRequest>>) -> Result<Response<Self::WatchStream>, Status> {
        let (outbound, responses) = mpsc::channel(OUTBOUND);
        let session = Session { store: self.store.clone(), outbound, watches: HashMap::new(), next: 0 };
        let token = self.token.clone();
        tokio::spawn(async move { token.run_until_cancelled(session.run(request.into_inner())).await });
        Ok(Response::new(ReceiverStream::new(responses)))
    }
}

/// One stream and its watches. They end with it.
struct Session {
    store: MemoryStore,
    outbound: Outbound,
    watches: HashMap<i64, AbortOnDropHandle<()>>,
    next: i64,
}

impl Session {
    async fn run(mut self, mut requests: Streaming<PbWatchRequest>) {
        loop {
            let request = tokio::select! {
                request = requests.message() => request,
                () = self.outbound.closed() => return,
            };
            let Ok(Some(request)) = request else { return };
            let answered = match request.request_union {
                Some(PbWatchRequestUnion::CreateRequest(create)) => {
                    let (key, end, from, id) = (create.key, create.range_end, create.start_revision, create.watch_id);
                    let wants = Wants {
                        previous: create.prev_kv,
                        puts: !create.filters.contains(&(WatchFilterType::NoPut as i32)),
                        deletes: !create.filters.contains(&(WatchFilterType::NoDelete as i32)),
                    };
                    self.create(text(key).map(|key| Keyspan::etcd(key, end)), from, id, wants).await
                }
                Some(PbWatchRequestUnion::CancelRequest(cancel)) => self.cancel(cancel.watch_id).await,
                Some(PbWatchRequestUnion::ProgressRequest(_)) => {
                    self.send(PbWatchResponse { watch_id: -1, ..self.bare() }).await
                }
                None => true,
            };
            if !answered {
                return;
            }
        }
    }

    /// Whether the client is still there.
    async fn send(&self, response: PbWatchResponse) -> bool {
        self.outbound.send(Ok(response)).await.is_ok()
    }

    fn bare(&self) -> PbWatchResponse {
        PbWatchResponse { header: self.store.with(|ledger| now(ledger)), ..PbWatchResponse::default() }
    }

    async fn create(&mut self, span: Result<Keyspan, Status>, from: i64, asked: i64, wants: Wants) -> bool {
        self.watches.retain(|_, watch| !watch.is_finished());
        let watch_id = if asked != 0 { asked } else { self.next };
        let bare = self.bare();
        let refuse = |reason: &str| PbWatchResponse {
            watch_id: -1,
            created: true,
            canceled: true,
            cancel_reason: reason.to_owned(),
            ..bare
        };
        let span = match span {
            Ok(span) => span,
            Err(status) => return self.send(refuse(status.message())).await,
        };
        if self.watches.contains_key(&watch_id) {
            return self.send(refuse("etcdserver: duplicate watch ID")).await;
        }
        if self.watches.len() >= MAX_WATCHES_PER_STREAM {
            return self.send(refuse("etcdserver: too many watches on one stream")).await;
        }
        let changes = self.store.with(|ledger| ledger.watch(span, from));
        let created = PbWatchResponse { watch_id, created: true, ..self.bare() };
        self.next = self.next.max(watch_id.saturating_add(1));
        match changes {
            Ok(changes) => {
                if !self.send(created).await {
                    return false;
                }
                let forward = forward(changes, watch_id, wants, self.outbound.clone(), self.store.clone());
                self.watches.insert(watch_id, AbortOnDropHandle::new(tokio::spawn(forward)));
                true
            }
            Err(Refusal::Compacted(compact_revision)) => {
                // As etcd does it: the watch exists, and then it ends.
                let ended = PbWatchResponse {
                    watch_id,
                    canceled: true,
                    compact_revision,
                    cancel_reason: "etcdserver: mvcc: required revision has been compacted".to_owned(),
                    ..self.bare()
                };
                self.send(created).await && self.send(ended).await
            }
            Err(refusal) => self.send(refuse(&refusal.to_string())).await,
        }
    }

    async fn cancel(&mut self, watch_id: i64) -> bool {
        if self.watches.remove(&watch_id).is_none() {
            return true;
        }
        self.send(PbWatchResponse { watch_id, canceled: true, ..self.bare() }).await
    }
}

#[derive(Debug, Clone, Copy)]
struct Wants {
    previous: bool,
    puts: bool,
    deletes: bool,
}

async fn forward(
    mut changes: mpsc::Receiver<Vec<Change>>,
    watch_id: i64,
    wants: Wants,
    outbound: Outbound,
    store: MemoryStore,
) {
    while let Some(batch) = changes.recv().await {
        for (revision, events) in messages(&batch, wants) {
            let response = PbWatchResponse { header: header(revision), watch_id, events, ..PbWatchResponse::default() };
            if outbound.send(Ok(response)).await.is_err() {
                return;
            }
        }
    }
    let ended = PbWatchResponse {
        header: store.with(|ledger| now(ledger)),
        watch_id,
        canceled: true,
        cancel_reason: "the watcher was too slow".to_owned(),
        ..PbWatchResponse::default()
    };
    // A client that has gone needs no goodbye.
    let _ = outbound.send(Ok(ended)).await;
}

/// A batch cut into messages of bearable size, each with the revision it reaches.
fn messages(batch: &[Change], wants: Wants) -> Vec<(i64, Vec<PbEvent>)> {
    let mut messages: Vec<(i64, Vec<PbEvent>)> = Vec::new();
    let mut room = 0;
    for change in batch {
        let wanted = match change.event {
            Event::Put(_) => wants.puts,
            Event::Delete { .. } => wants.deletes,
        };
        if !wanted {
            continue;
        }
        let (event, bytes) = event(change, wants.previous);
        match messages.last_mut() {
            Some((revision, events)) if bytes <= room => {
                *revision = change.event.revision();
                events.push(event);
                room -= bytes;
            }
            _ => {
                messages.push((change.event.revision(), vec![event]));
                room = MESSAGE_BYTES.saturating_sub(bytes);
            }
        }
    }
    messages
}

fn event(change: &Change, previous: bool) -> (PbEvent, usize) {
    let (kind, kv) = match &change.event {
        Event::Put(entry) => (EventType::Put, pair(entry)),
        Event::Delete { key, revision } => {
            let gone = PbKeyValue { key: key.clone().into_bytes(), mod_revision: *revision, ..PbKeyValue::default() };
            (EventType::Delete, gone)
        }
    };
    let prev_kv = change.previous.as_ref().filter(|_| previous).map(pair);
    let weigh = |pair: &PbKeyValue| pair.key.len() + pair.value.len() + 64;
    let bytes = weigh(&kv) + prev_kv.as_ref().map_or(0, weigh);
    (PbEvent { r#type: kind.into(), kv: Some(kv), prev_kv }, bytes)
}
