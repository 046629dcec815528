//! What the same work costs without us.

use std::{fs::File, io::Write as _, process::Stdio};

use super::fake_vmhost::FakeVmHost;

/// A process that does nothing, and its end.
pub async fn fork_exec() -> anyhow::Result<()> {
    let status = tokio::process::Command::new("/bin/true").stdin(Stdio::null()).stdout(Stdio::null()).status().await?;
    anyhow::ensure!(status.success());
    Ok(())
}

/// F: three unary calls, an fdatasync and a process, one after the other.
pub async fn floor(bare: &FakeVmHost, file: &mut File) -> anyhow::Result<()> {
    for _ in 0..3 {
        bare.echo().await?;
    }
    file.write_all(&[0; 512])?;
    file.sync_data()?;
    fork_exec().await
}
