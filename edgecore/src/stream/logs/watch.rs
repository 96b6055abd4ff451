//! Waits for a change in a directory (adapter: inotify).

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;

/// Between two looks where the kernel gives no watch: a user may have 128 of them.
const UNWATCHED: Duration = Duration::from_millis(250);

/// Tells when anything in a directory was written, made or renamed since it was last asked.
pub(super) struct Watch {
    events: Option<AsyncFd<OwnedFd>>,
}

impl Watch {
    /// A directory that cannot be watched is taken for one that changes all the time.
    pub(super) fn on(dir: &Path) -> Self {
        let events = open(dir)
            .inspect_err(|error| tracing::debug!(?dir, %error, "a log is polled, not watched"))
            .ok();
        Self { events }
    }

    /// Returns when there was a change. Cancel safe: a change is told until this has returned.
    pub(super) async fn changed(&mut self) -> io::Result<()> {
        let Some(events) = &self.events else {
            tokio::time::sleep(UNWATCHED).await;
            return Ok(());
        };
        loop {
            let mut ready = events.readable().await?;
            // What happened is not asked: a look at the files tells.
            let mut told = [0; 4096];
            let drained = ready.try_io(|fd| Ok(nix::unistd::read(fd, &mut told)?));
            match drained {
                Ok(Ok(_)) => return Ok(()),
                Ok(Err(error)) => return Err(error),
                Err(_would_block) => {}
            }
        }
    }
}

#[expect(
    deprecated,
    reason = "an OwnedFd keeps its descriptor for as long as it is registered"
)]
fn open(dir: &Path) -> io::Result<AsyncFd<OwnedFd>> {
    let watch = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
    let what = AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVE;
    watch.add_watch(dir, what | AddWatchFlags::IN_ONLYDIR)?;
    AsyncFd::new(watch.into())
}
