//! Serves an embedded store until Ctrl-C, to look into with etcdctl.
//!
//! In: an address, `127.0.0.1:2379` if none is given. Out: etcd's v3 API, as far as Conclave uses it. Never here: a file.
//!
//! ```text
//! cargo run -p conclave-placement --example embedded_store -- 127.0.0.1:2379
//! etcdctl --endpoints 127.0.0.1:2379 put greeting hello
//! ```

use conclave_placement::store::memory::MemoryStore;
use conclave_placement::store::serve::serve_memory;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:2379".to_owned());
    let listener = TcpListener::bind(&address).await?;
    println!("serving an embedded store at {}", listener.local_addr()?);
    let token = CancellationToken::new();
    let stop = token.clone();
    tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            stop.cancel();
        }
    });
    Ok(serve_memory(MemoryStore::new(), listener, token).await?)
}
