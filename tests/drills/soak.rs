//! Ten minutes of ordinary life, clients that leave included: what is used at the end is what was used at the beginning.

use std::time::Duration;

use conclave_tests::{
    cluster::Cluster,
    drill::{Aim, Drill, Form},
    vitals::Course,
};

use crate::scene;

const MINUTES: u64 = 10;
/// While caches and allocators fill.
const FILLING: Duration = Duration::from_secs(120);
/// Growth that is none: allocators round up now and then.
const KIB_PER_MINUTE: f64 = 512.0;

#[tokio::test]
async fn ten_minutes() {
    let _alone = scene::alone().await;
    if Form::asked_for() == Form::Short {
        println!("at full length only (make drills)");
        return;
    }
    let cluster = scene::builder(4, 2).routers(2).start().await;
    let aim = Aim::waited_out("26", "ten minutes, every third request left by its client", 2);
    let mut drill = Drill::begin(aim, &cluster, scene::work(&cluster).await.leave_every(3)).await;
    drill.fault();
    drill.goes_on(FILLING).await;
    let (mut course, processes) = (Course::begin(), processes(&cluster));
    for _ in 0..(MINUTES * 60 - FILLING.as_secs()) / 2 {
        course.read(&processes);
        drill.goes_on(Duration::from_secs(2)).await;
    }
    let slopes = course.slopes();
    for (name, slope) in &slopes {
        let (memory, descriptors) = (slope.kib_per_minute, slope.descriptors_per_minute);
        drill.note(
            name,
            format!("{} KiB {memory:+.0}/min, {} fds {descriptors:+.2}/min", slope.anonymous_kib, slope.descriptors),
        );
    }
    drill.over();
    drill.end().await;
    for (name, slope) in slopes {
        assert!(slope.kib_per_minute < KIB_PER_MINUTE, "{name} grows: {slope:?}");
        assert!(slope.descriptors_per_minute.abs() < 0.5, "{name} opens more and more: {slope:?}");
    }
}

fn processes(cluster: &Cluster) -> Vec<(String, u32)> {
    let all = cluster.workers.iter().chain(&cluster.routers);
    all.map(|process| (process.name().to_owned(), process.pid().expect("it runs"))).collect()
}
