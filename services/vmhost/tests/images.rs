//! What a node tells of its images.

#![allow(clippy::unwrap_used, reason = "the steps of a test may fail it")]

mod support;

use std::sync::Arc;

use blixard::{
    config::DriverChoice,
    pb::common::v1::{JobState, VmKind},
};
use blixard_vmhost::hypervisor::choose;
use support::{NODE, World, passing::Passing, shell, wait_for};

#[tokio::test]
async fn a_node_registers_again_when_its_images_change_and_what_runs_there_goes_on() {
    let world = World::new().await;
    let (inner, _) = choose(DriverChoice::Process, &world.settings()).unwrap();
    let driver = Passing::new(inner);
    let images = driver.images.clone();
    let node = world.node_with(Arc::new(driver)).await;
    let vm = world.start_vm(&node, VmKind::Service).await;
    let until = world.vm_state_dir().join("go-on");
    let job =
        world.run(&node, vm, shell(&format!("until [ -e {} ]; do sleep 0.05; done; echo done", until.display()))).await;
    world.wait_job_until(job, |job| job.state() == JobState::Running).await;

    images.lock().unwrap().push("imported".to_owned());
    wait_for("the registry to be told", || {
        let state = world.registry.state();
        let node = &state.nodes[NODE];
        if node.images == ["default", "imported"] && node.incarnation == 2 { Ok(()) } else { Err(format!("{node:?}")) }
    })
    .await;
    std::fs::write(&until, "").unwrap();
    let job = world.wait_job(job).await;
    assert_eq!((job.state(), job.attempt), (JobState::Succeeded, 1), "{}", job.reason);
    assert_eq!(world.registry.state().nodes[NODE].incarnation, 2, "one change is told once");
    std::fs::remove_file(&until).unwrap();
}
