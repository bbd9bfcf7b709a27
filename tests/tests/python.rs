//! A client in another language, made from the `.proto` files alone, gets what the contract promises.

use std::path::Path;

use conclave_tests::{
    cluster::Cluster,
    golden::Golden,
    process::{Process, checkout},
};

#[tokio::test]
async fn a_python_client_made_from_the_proto_files_alone_is_served() {
    let checkout = checkout();
    let python = checkout.join(".deps/python/bin/python");
    assert!(python.exists(), "{} is missing: run `make setup`", python.display());
    let golden = Golden::named("v3_tied");
    let cluster = Cluster::builder(&golden.folder).workers(2).start().await;

    let script = checkout.join("tests/python/test_client.py").display().to_string();
    let address = format!("CONCLAVE_INFERENCE={}", cluster.router_address(0).await);
    let arguments = [address, python.display().to_string(), script];
    let mut client = Process::spawn("test_client", Path::new("/usr/bin/env"), &arguments, cluster.log_folder());
    let status = client.ended().await;
    assert!(status.success(), "the client ended with {status}:\n{}", client.log());
}
