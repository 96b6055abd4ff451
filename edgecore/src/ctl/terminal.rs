//! The terminal of whoever runs `ctl exec -t`: raw while the command has it, as it was afterwards,
//! however that comes.

use std::io::{self, IsTerminal as _};
use std::sync::Arc;

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use super::CtlError;

/// Whether the standard input is one.
pub(super) fn is_here() -> bool {
    io::stdin().is_terminal()
}

/// Columns and rows, where the output goes to a terminal.
pub(super) fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(io::stdout()).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

/// The terminal passes every key on until this is dropped.
pub(super) struct Raw {
    saved: Arc<Termios>,
}

impl Raw {
    pub(super) fn enter() -> Result<Self, CtlError> {
        let failed = |e: rustix::io::Errno| CtlError::Terminal(e.into());
        let saved = tcgetattr(io::stdin()).map_err(failed)?;
        let mut raw = saved.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw).map_err(failed)?;
        let saved = Arc::new(saved);
        restore_on_panic(saved.clone());
        Ok(Self { saved })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore(&self.saved);
    }
}

fn restore(saved: &Termios) {
    // A terminal that is gone needs nothing.
    let _ = tcsetattr(io::stdin(), OptionalActions::Now, saved);
}

/// A panic may end the process before anything is dropped.
fn restore_on_panic(saved: Arc<Termios>) {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        restore(&saved);
        usual(panic);
    }));
}
