//! The device's clocks. Only this file and the adapters read them.

use nix::time::{ClockId, clock_gettime};

fn seconds(clock: ClockId) -> u64 {
    clock_gettime(clock).map_or(0, |t| u64::try_from(t.tv_sec()).unwrap_or(0))
}

/// Seconds since boot, sleep included: never steps.
pub fn boot_seconds() -> u64 {
    seconds(ClockId::CLOCK_BOOTTIME)
}

/// Seconds since 1970, as the device believes.
pub fn wall_seconds() -> u64 {
    seconds(ClockId::CLOCK_REALTIME)
}

/// Random for each boot; empty where the kernel does not tell.
pub fn boot_id() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    id.map(|s| s.trim().to_owned()).unwrap_or_default()
}

/// Whether something (NTP, PTP, a GPS) keeps the kernel's clock right: the kernel's own word.
#[expect(
    unsafe_code,
    reason = "adjtimex has no safe wrapper among our dependencies"
)]
pub fn synchronised() -> bool {
    const STA_UNSYNC: i32 = 0x40;
    const TIME_ERROR: i32 = 5;
    // SAFETY: an all-zero timex asks for nothing to be changed, and lives across the call.
    let (state, status) = unsafe {
        let mut timex: nix::libc::timex = std::mem::zeroed();
        (nix::libc::adjtimex(&raw mut timex), timex.status)
    };
    state >= 0 && state != TIME_ERROR && status & STA_UNSYNC == 0
}
