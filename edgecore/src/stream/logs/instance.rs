//! One instance of a container as its log shows it: where the file is, and when nothing more comes.
//!
//! Which instance is meant, and why there may be none, [`super::super::containers`] decides.

use std::path::PathBuf;
use std::time::Duration;

use crate::cri::Runtime;
use crate::cri::convert;
use crate::pods::seen::Run;

/// Between two questions whether a container that somebody follows still runs.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// The log of one instance of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    /// The container's own directory.
    pub dir: PathBuf,
    /// The instance's number, which is its file's name.
    pub attempt: u32,
}

impl Log {
    pub fn path(&self) -> PathBuf {
        self.dir.join(format!("{}.log", self.attempt))
    }
}

/// Returns when the container has ended or is gone. It asks once a second, for as long as somebody
/// follows; a runtime that does not answer has not said that the container ended.
pub async fn container_ended(cri: Runtime, id: String) {
    loop {
        match cri
            .container_status(&id)
            .await
            .map(|s| convert::run(s.state))
        {
            Ok(Run::Exited) => return,
            Err(e) if e.not_found() => return,
            Ok(Run::Created | Run::Running | Run::Unknown) | Err(_) => {}
        }
        tokio::time::sleep(ASK_AGAIN).await;
    }
}
