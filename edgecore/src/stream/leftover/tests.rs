//! Claims on a device that is a script, in paused time.

use std::sync::atomic::AtomicBool;

use tokio::time::sleep;

use super::*;

const SHIM: i32 = 1;
const CONTAINER: &str = "leftover-tests";

/// Processes that end when they are asked to, or only when killed.
#[derive(Default)]
struct Script {
    now: AtomicU64,
    processes: Mutex<Vec<Process>>,
    stubborn: AtomicBool,
}

impl Device for Arc<Script> {
    fn now(&self) -> Ticks {
        Ticks(self.now.load(Ordering::Relaxed))
    }

    fn processes(&self, _: &str) -> Vec<Process> {
        lock(&self.processes).clone()
    }

    fn send(&self, to: &Process, signal: Signal) {
        let deaf = self.stubborn.load(Ordering::Relaxed) && signal != Signal::SIGKILL;
        if !deaf && signal != Signal::SIGCONT {
            lock(&self.processes).retain(|p| !p.is(to));
        }
    }
}

struct Rig {
    device: Arc<Script>,
    leftovers: Leftovers,
    _task: JoinSet<()>,
}

impl Rig {
    fn start() -> Self {
        let device = Arc::new(Script::default());
        // The container's own.
        device.begins(10, 5, "tail -f x");
        let (leftovers, task) = Leftovers::on(Box::new(device.clone()));
        let mut tasks = JoinSet::new();
        tasks.spawn(task.run(CancellationToken::new()));
        Self {
            device,
            leftovers,
            _task: tasks,
        }
    }

    fn claims(&self, at: u64, command: &str) -> Claim {
        self.device.now.store(at, Ordering::Relaxed);
        self.leftovers.claim(CONTAINER, &words(command))
    }

    /// A process that an exec asked for at that time started a tick later.
    fn execs(&self, pid: i32, at: u64, command: &str, taken: &str) -> Claim {
        let claim = self.claims(at, command);
        self.device.begins(pid, at + 1, taken);
        claim
    }

    fn alive(&self) -> Vec<i32> {
        lock(&self.device.processes).iter().map(|p| p.pid).collect()
    }
}

impl Script {
    fn begins(&self, pid: i32, began: u64, command: &str) {
        lock(&self.processes).push(Process {
            pid,
            parent: SHIM,
            session: pid,
            began: Ticks(began),
            command: format!("{}\0", command.replace(' ', "\0")).into_bytes(),
        });
    }
}

fn words(command: &str) -> Vec<String> {
    command.split(' ').map(str::to_owned).collect()
}

async fn ms(count: u64) {
    sleep(Duration::from_millis(count)).await;
}

#[tokio::test(start_paused = true)]
async fn what_leaves_soon_after_another_is_ended_as_well() {
    // The second a command by its name, and a script's.
    for (commands, taken) in [
        (["tail -f x"; 2], ["tail -f x"; 2]),
        (["one.sh", "two.sh"], ["sh one.sh", "sh two.sh"]),
    ] {
        for stubborn in [false, true] {
            for gap in [0, 3, 60, 200, 1000] {
                let rig = Rig::start();
                rig.device.stubborn.store(stubborn, Ordering::Relaxed);
                let first = rig.execs(20, 100, commands[0], taken[0]);
                let second = rig.execs(21, 200, commands[1], taken[1]);
                rig.device.now.store(300, Ordering::Relaxed);
                drop(first);
                ms(gap).await;
                drop(second);
                ms(3000).await;
                assert_eq!(rig.alive(), [10], "{commands:?} {gap} ms, {stubborn}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn all_of_one_lost_link_are_ended_within_a_second_and_nobody_elses() {
    let rig = Rig::start();
    rig.device.stubborn.store(true, Ordering::Relaxed);
    let names = ["one.sh", "two.sh", "three.sh"];
    let lost: Vec<Claim> = (20..)
        .zip(names)
        .map(|(pid, name)| rig.execs(pid, 100, name, "sh x"))
        .collect();
    let stays = rig.execs(30, 100, "tail -f y", "tail -f y");
    let later = rig.execs(31, 5000, "four.sh", "sh x");
    drop(lost);
    ms(900).await;
    assert_eq!(rig.alive(), [10, 30, 31]);
    drop((stays, later));
    ms(3000).await;
    assert_eq!(rig.alive(), [10]);
}

#[tokio::test(start_paused = true)]
async fn what_was_not_clear_is_so_when_the_other_is_over() {
    for other_ends_by_itself in [false, true] {
        let rig = Rig::start();
        let slow = rig.claims(100, "tail -f x");
        let quick = rig.claims(101, "tail -f x");
        rig.device.begins(20, 103, "tail -f x");
        rig.device.begins(21, 104, "tail -f x");
        drop(slow);
        ms(60_000).await;
        assert_eq!(rig.alive(), [10, 20, 21], "one has its asker");
        if other_ends_by_itself {
            lock(&rig.device.processes).retain(|p| p.pid != 20);
            quick.settle();
        } else {
            rig.device.now.store(200, Ordering::Relaxed);
            drop(quick);
        }
        ms(3000).await;
        assert_eq!(rig.alive(), [10], "{other_ends_by_itself}");
        let known = lock(&rig.leftovers.shared.known);
        assert!(known.claims.is_empty() && known.aside.is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn a_claim_whose_process_is_being_ended_stands_for_no_other() {
    let rig = Rig::start();
    rig.device.stubborn.store(true, Ordering::Relaxed);
    let first = rig.execs(20, 100, "tail -f x", "tail -f x");
    let second = rig.execs(21, 200, "tail -f x", "tail -f x");
    drop(first);
    ms(100).await;
    // Somebody's at the device, in the time of the first.
    rig.device.begins(22, 201, "tail -f x");
    drop(second);
    ms(3000).await;
    assert_eq!(rig.alive(), [10, 21, 22]);
}

#[tokio::test(start_paused = true)]
async fn what_is_not_clear_at_first_is_looked_at_again() {
    let rig = Rig::start();
    let exec = rig.execs(20, 100, "one.sh", "sh one.sh");
    // Of a runtime's own exec, which no claim tells of.
    rig.device.begins(21, 103, "sh probe.sh");
    drop(exec);
    ms(300).await;
    assert_eq!(rig.alive(), [10, 20, 21]);
    lock(&rig.device.processes).retain(|p| p.pid != 21);
    ms(1500).await;
    assert_eq!(rig.alive(), [10]);
}

#[tokio::test(start_paused = true)]
async fn the_process_of_a_hook_is_nobodys_leftover() {
    let rig = Rig::start();
    // The hook's claim is by the device's real clock.
    let now = Ticks::now().0;
    let exec = rig.claims(now, "one.sh");
    let hook = ours(CONTAINER, &words("hook.sh"));
    rig.device.begins(20, now + 5, "sh hook.sh");
    drop(exec);
    ms(3000).await;
    assert_eq!(rig.alive(), [10, 20]);
    drop(hook);
    assert!(lock(&OURS).iter().all(|c| c.container != CONTAINER));
}
