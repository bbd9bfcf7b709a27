//! A whole cluster on one GPU, made up where this machine has none: router and workers as processes on `cuda:0`.

#[path = "../../model/tests/made_up_gpu/mod.rs"]
mod made_up_gpu;

use conclave_model::device::Device;
use conclave_tests::{client::greedy, cluster::Cluster, etcd::EtcdProcess, golden::Golden};

#[tokio::test]
async fn a_cluster_on_a_gpu_says_what_the_reference_says_and_goes_on_without_a_worker() {
    let gpu = Device::Cuda(0);
    if let Err(error) = gpu.open() {
        return made_up_gpu::again(error);
    }
    let etcd = EtcdProcess::start().await;
    // One that is made up takes its time: three of them say enough there.
    let few = ["v2_lite", "v3_aligned", "v3_fp8"];
    for golden in Golden::all().into_iter().filter(|golden| !made_up_gpu::is_here() || few.contains(&&*golden.name)) {
        let built = Cluster::builder(&golden.folder).device(gpu).store(&etcd.spec()).workers(2).replicas(2);
        let mut cluster = built.start().await;
        let client = cluster.client(0).await;
        for (nth, case) in golden.cases.iter().enumerate() {
            if nth == 1 {
                cluster.workers[1].kill().await;
            }
            let count = u32::try_from(case.greedy.len()).expect("a short answer");
            let answer = client.answer(greedy(&case.prompt, count)).await;
            assert_eq!(answer.ids(), case.greedy, "{}, prompt of {} tokens", golden.name, case.prompt.len());
        }
    }
}
