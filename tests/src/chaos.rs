//! A TCP proxy between routers and one worker that breaks the way networks do.
//!
//! In: a fault, set or lifted at any moment, for living connections and new ones alike. Out: bytes, late, few, wrong or
//! never. Never here: HTTP/2 (it carries bytes and knows no frames), or a byte lost from a connection that lives on:
//! what a hole held back arrives when it closes, as after a real partition.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, tcp},
    sync::watch,
    task::JoinSet,
    time::sleep,
};
use tokio_util::sync::{CancellationToken, DropGuard};

/// Bytes that are read at once.
const CHUNK: usize = 16 << 10;

/// What the network does.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Fault {
    /// Carries everything.
    #[default]
    None,
    /// Accepts connections and carries nothing that way, without a word to either side.
    Hole(Way),
    /// Each piece of an answer comes this much later.
    Late(Duration),
    /// So many bytes a second, each way.
    Narrow(u32),
    /// One bit of every so many bytes that way is another.
    Flip(Way, u32),
    /// Each side is told that the other will send nothing more, once, and what it sends goes nowhere.
    HalfClose,
    /// Whoever closes a connection is heard that much later on the other side.
    SlowClose(Duration),
    /// Every so many pieces one waits, as for a packet that is sent again, and all behind it.
    Lossy {
        /// Of how many pieces one.
        every: u32,
        /// How long.
        wait: Duration,
    },
    /// Every connection ends with a reset, new ones at once.
    Refuse,
}

/// A direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Rows on their way out.
    ToWorker,
    /// Answers.
    ToRouter,
    /// Both of them.
    Both,
}

/// What connections follow.
#[derive(Clone, Debug, Default)]
struct State {
    fault: Fault,
    /// Connections older than the last reset end.
    resets: u64,
    /// Where the worker listens, once it is known.
    worker: Option<String>,
}

/// A running proxy. Dropped, it is gone with all its connections.
#[derive(Debug)]
pub struct Proxy {
    address: String,
    state: watch::Sender<State>,
    _stop: DropGuard,
}

impl Proxy {
    /// Listens on a free port; connections wait until [`Proxy::lead_to`] says where they go.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound listener has an address").to_string();
        let (state, follow) = watch::channel(State::default());
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        tokio::spawn(async move { stopped.run_until_cancelled(accept(listener, follow)).await });
        Self { address, state, _stop: stop.drop_guard() }
    }

    /// What a worker advertises instead of its own address.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Where the worker really listens.
    pub fn lead_to(&self, worker: String) {
        self.state.send_modify(|state| state.worker = Some(worker));
    }

    /// From now on, until told otherwise.
    pub fn set(&self, fault: Fault) {
        self.state.send_modify(|state| state.fault = fault);
    }

    /// Resets every connection of this moment.
    pub fn reset(&self) {
        self.state.send_modify(|state| state.resets += 1);
    }
}

async fn accept(listener: TcpListener, state: watch::Receiver<State>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Ok((router, _)) = listener.accept() => {
                connections.spawn(carry(router, state.clone()));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// One connection, until either side closes it or a fault resets it.
async fn carry(mut router: TcpStream, mut state: watch::Receiver<State>) {
    let known = state.wait_for(|state| state.worker.is_some() || state.fault == Fault::Refuse).await;
    let Ok((Some(address), resets)) = known.map(|state| (state.worker.clone(), state.resets)) else {
        return reset(&router);
    };
    if state.borrow().fault == Fault::Refuse {
        return reset(&router);
    }
    let Ok(mut worker) = TcpStream::connect(&address).await else { return reset(&router) };
    for socket in [&router, &worker] {
        // A socket that just closed has nothing to be set.
        let _ = socket.set_nodelay(true);
    }
    let ((from_router, to_router), (from_worker, to_worker)) = (router.split(), worker.split());
    let cut = state.clone();
    let carried = async {
        tokio::join!(
            pump(from_router, to_worker, Way::ToWorker, cut.clone()),
            pump(from_worker, to_router, Way::ToRouter, cut),
        )
    };
    let ended = async { state.wait_for(|state| state.fault == Fault::Refuse || state.resets != resets).await.is_ok() };
    let was_reset = tokio::select! {
        _ = carried => false,
        was_reset = ended => was_reset,
    };
    if was_reset {
        reset(&router);
        reset(&worker);
    }
}

/// With nothing left to linger for, closing a socket sends RST.
fn reset(socket: &TcpStream) {
    // A socket that just closed needs no reset.
    let _ = socket.set_zero_linger();
}

/// One direction, until its end or an error; the end is passed on.
async fn pump(
    mut from: tcp::ReadHalf<'_>,
    mut to: tcp::WriteHalf<'_>,
    way: Way,
    mut state: watch::Receiver<State>,
) -> std::io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    let (mut carried, mut pieces) = (0, 0u32);
    loop {
        let fault = passable(&mut state, way).await;
        if fault == Fault::HalfClose {
            to.shutdown().await?;
            while from.read(&mut buffer).await? > 0 {}
            return Ok(());
        }
        let most = if let Fault::Narrow(rate) = fault { (rate as usize / 20).clamp(1, CHUNK) } else { CHUNK };
        let read = tokio::select! {
            read = from.read(&mut buffer[..most]) => read?,
            // Another fault may want other pieces.
            Ok(()) = state.changed() => continue,
        };
        if read == 0 {
            let fault = state.borrow().fault;
            if let Fault::SlowClose(delay) = fault {
                sleep(delay).await;
            }
            return to.shutdown().await;
        }
        match (passable(&mut state, way).await, way) {
            (Fault::Late(delay), Way::ToRouter) => sleep(delay).await,
            (Fault::Narrow(rate), _) => sleep(Duration::from_secs_f64(read as f64 / f64::from(rate))).await,
            (Fault::Flip(wrong, every), _) if wrong == way => flip(&mut buffer[..read], carried, every),
            (Fault::Lossy { every, wait }, _) if pieces.is_multiple_of(every) => sleep(wait).await,
            _ => {}
        }
        pieces = pieces.wrapping_add(1);
        carried += read as u64;
        passable(&mut state, way).await;
        to.write_all(&buffer[..read]).await?;
    }
}

/// The fault of the moment, once it lets anything through that way.
async fn passable(state: &mut watch::Receiver<State>, way: Way) -> Fault {
    let open = |state: &State| match state.fault {
        Fault::Hole(Way::Both) => false,
        Fault::Hole(closed) => closed != way,
        _ => true,
    };
    match state.wait_for(open).await {
        Ok(state) => state.fault,
        // The proxy is gone, and this task with it.
        Err(_) => Fault::None,
    }
}

/// Changes one bit of each `every` bytes of a stream of which `before` are gone; which bit moves on.
fn flip(bytes: &mut [u8], before: u64, every: u32) {
    let every = u64::from(every.max(1));
    for (place, byte) in (before..).zip(bytes) {
        if place % every == every - 1 {
            *byte ^= 1 << (place / every % 8);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eventually::soon;

    async fn connected() -> (Proxy, TcpStream, TcpStream) {
        let worker = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let proxy = Proxy::start().await;
        proxy.lead_to(worker.local_addr().expect("bound").to_string());
        let router = TcpStream::connect(proxy.address()).await.expect("the proxy accepts");
        let (accepted, _) = soon("the worker's side", worker.accept()).await.expect("the proxy connects");
        (proxy, router, accepted)
    }

    async fn three(from: &mut TcpStream) -> std::io::Result<[u8; 3]> {
        let mut bytes = [0; 3];
        soon("three bytes", from.read_exact(&mut bytes)).await.map(|_| bytes)
    }

    #[tokio::test]
    async fn what_a_hole_holds_back_arrives_when_it_closes() {
        let (proxy, mut router, mut worker) = connected().await;
        proxy.set(Fault::Hole(Way::ToRouter));
        router.write_all(b"out").await.expect("a living socket");
        assert_eq!(&three(&mut worker).await.expect("the other way is open"), b"out");
        worker.write_all(b"in!").await.expect("a living socket");
        let held = tokio::time::timeout(Duration::from_millis(50), router.readable()).await;
        assert!(held.is_err(), "something came through the hole");
        proxy.set(Fault::None);
        assert_eq!(&three(&mut router).await.expect("the hole is closed"), b"in!");
    }

    #[tokio::test]
    async fn a_reset_is_one_for_both_sides_and_spares_who_comes_later() {
        let (proxy, mut router, mut worker) = connected().await;
        router.write_all(b"out").await.expect("a living socket");
        three(&mut worker).await.expect("carried");
        proxy.reset();
        for socket in [&mut router, &mut worker] {
            let error = three(socket).await.expect_err("nothing comes any more");
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        }
        TcpStream::connect(proxy.address()).await.expect("the proxy still accepts");
    }

    #[test]
    fn one_bit_in_so_many_bytes_is_another_across_pieces() {
        let mut pieces = [[0; 3], [0; 3]];
        let [first, second] = &mut pieces;
        flip(first, 0, 4);
        flip(second, 3, 4);
        assert_eq!(pieces, [[0, 0, 0], [1, 0, 0]]);
    }
}
