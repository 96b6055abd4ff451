//! A container's processes, and which of them an exec started (pure, but for [`read`] and the
//! clock).

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// A process that took another command line than it was asked for is one exec's only if it began
/// this soon after it, in ticks: the asker's streams come first, over a slow link.
const SOON: u64 = 10 * USER_HZ;
/// A process that began so long after its asker left is not looked for any more.
const LATE: u64 = 2 * USER_HZ;
/// The unit of `/proc` on every architecture that Linux shows to programs.
const USER_HZ: u64 = 100;
/// A command line beyond this is cut at both sides of the comparison.
const LONGEST_COMMAND: usize = 256 * 1024;

/// Since the device's boot, in the unit of `/proc/PID/stat`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Ticks(pub u64);

impl Ticks {
    pub fn now() -> Self {
        let clock = nix::time::ClockId::CLOCK_BOOTTIME;
        let now = nix::time::clock_gettime(clock).map(std::time::Duration::from);
        let millis = now.unwrap_or_default().as_millis();
        Self(u64::try_from(millis).unwrap_or(0) * USER_HZ / 1000)
    }
}

/// An exec: what it asked for, and when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Started {
    pub id: u64,
    /// The runtime's ID of the container.
    pub container: String,
    pub command: Vec<String>,
    pub asked: Ticks,
    /// When its asker left: it is to be ended.
    pub left: Option<Ticks>,
}

impl Started {
    /// When its process can have begun, at most so long after it was asked for.
    fn window(&self, most: u64) -> Window {
        let most = self.asked.0.saturating_add(most);
        let last = self.left.map_or(u64::MAX, |left| left.0 + LATE);
        Window {
            id: self.id,
            held: self.left.is_none(),
            // `/proc` rounds down.
            from: self.asked.0.saturating_sub(1),
            until: most.min(last),
        }
    }

    /// Whether the process can be this one's.
    fn can_be(&self, process: &Process) -> bool {
        self.window(u64::MAX).holds(process)
    }

    fn named(&self, process: &Process) -> bool {
        let mut command = Vec::new();
        for word in &self.command {
            command.extend_from_slice(word.as_bytes());
            command.push(0);
        }
        command.truncate(LONGEST_COMMAND);
        command == process.command
    }
}

/// A process as the device sees it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Process {
    pub pid: i32,
    pub parent: i32,
    pub session: i32,
    pub began: Ticks,
    /// Its words, each ended by a zero.
    pub command: Vec<u8>,
}

impl Process {
    /// A number is given again; a number and a time are not.
    pub fn is(&self, other: &Self) -> bool {
        self.pid == other.pid && self.began == other.began
    }
}

/// Which process is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    None,
    Found(Process),
    /// As many could be.
    Unclear(usize),
}

/// When the process of one exec can have begun.
struct Window {
    id: u64,
    /// Its asker is still there: its process must not be touched.
    held: bool,
    from: u64,
    until: u64,
}

impl Window {
    fn holds(&self, process: &Process) -> bool {
        (self.from..=self.until).contains(&process.began.0)
    }
}

/// The process that an exec started. `others` are the other execs into the container; what is in
/// `ended` is nobody's any more.
pub fn started_by(
    mine: &Started,
    others: &[Started],
    table: &[Process],
    ended: &[(i32, Ticks)],
) -> Verdict {
    let pids: BTreeSet<i32> = table.iter().map(|p| p.pid).collect();
    let mut roots: Vec<&Process> = table
        .iter()
        .filter(|p| !pids.contains(&p.parent) && !ended.contains(&(p.pid, p.began)))
        .collect();
    roots.sort_by_key(|p| (p.began, p.pid));
    let equals = others.iter().filter(|o| o.command == mine.command);
    let same: Vec<&Started> = equals.chain([mine]).collect();
    let named: Vec<&Process> = roots
        .iter()
        .copied()
        .filter(|p| mine.named(p) && same.iter().any(|s| s.can_be(p)))
        .collect();
    if named.iter().any(|p| mine.can_be(p)) {
        let windows: Vec<Window> = same.iter().map(|s| s.window(u64::MAX)).collect();
        // An equal one whose asker is there is no rival for what another must have.
        let rivals = |w: &Window, p: &Process| has(w, p, &windows, &named);
        return choose(mine, &windows, &named, rivals);
    }
    among_strangers(mine, others, &roots)
}

/// No process has the command line: a script's has its interpreter's, a shell's its last
/// command's. One that is new, began a session as the runtime makes it, and is nobody else's.
fn among_strangers(mine: &Started, others: &[Started], roots: &[&Process]) -> Verdict {
    let own = mine.window(SOON);
    let fresh: Vec<&Process> = roots
        .iter()
        .copied()
        .filter(|p| p.session == p.pid && own.holds(p))
        .filter(|p| !others.iter().any(|o| o.named(p)))
        .collect();
    let unsettled = others.iter().filter(|o| !settled(o, others, roots));
    let rivals = unsettled.map(|o| o.window(SOON));
    let windows: Vec<Window> = rivals
        .filter(|w| fresh.iter().any(|p| w.holds(p)))
        .chain([mine.window(SOON)])
        .collect();
    choose(mine, &windows, &fresh, Window::holds)
}

/// Whether a process has its command line, and one for each that asked for an equal one.
fn settled(one: &Started, others: &[Started], roots: &[&Process]) -> bool {
    let equals = || others.iter().filter(|o| o.command == one.command);
    let named = roots.iter().filter(|p| one.named(p));
    let theirs = named.filter(|p| equals().any(|o| o.can_be(p))).count();
    theirs >= equals().count() && roots.iter().any(|p| one.named(p) && one.can_be(p))
}

/// Of processes in the order of their beginning one that can be mine, and nobody's whose asker is
/// there. When all that it could belong to are to be ended, it does not matter whose it is: each
/// takes one, so that the others' are still there for them.
fn choose(
    mine: &Started,
    windows: &[Window],
    processes: &[&Process],
    rival: impl Fn(&Window, &Process) -> bool,
) -> Verdict {
    let Some(own) = windows.iter().find(|w| w.id == mine.id) else {
        return Verdict::None;
    };
    if processes.is_empty() {
        return Verdict::None;
    }
    let held = || windows.iter().filter(|w| w.held && w.id != mine.id);
    let unclear = Verdict::Unclear(processes.len().max(held().count()));
    let found = processes
        .iter()
        .copied()
        .find(|p| has(own, p, windows, processes) && !held().any(|w| rival(w, p)));
    found.map_or(unclear, |process| Verdict::Found(process.clone()))
}

/// Whether a process can be one exec's, with an exec for each of the other processes: of what is
/// left over, one is somebody's who is not known.
fn has(one: &Window, process: &Process, windows: &[Window], processes: &[&Process]) -> bool {
    let rest = processes.iter().copied().filter(|p| !p.is(process));
    one.holds(process) && each_has_one(rest, windows.iter().filter(|w| w.id != one.id))
}

/// Whether there is an exec for each of the processes, which come in the order of their beginning:
/// each takes the one that can have no later one soonest.
fn each_has_one<'a>(
    processes: impl Iterator<Item = &'a Process>,
    windows: impl Iterator<Item = &'a Window>,
) -> bool {
    let mut free: Vec<&Window> = windows.collect();
    for process in processes {
        let fits = free.iter().enumerate().filter(|(_, w)| w.holds(process));
        let Some((index, _)) = fits.min_by_key(|(_, w)| w.until) else {
            return false;
        };
        free.swap_remove(index);
    }
    true
}

/// A process, its session and its descendants.
pub fn with_children(root: &Process, table: &[Process]) -> Vec<Process> {
    let mut family = vec![root.clone()];
    let mut next = 0;
    // Grows by what it finds; each process is found once.
    while let Some(parent) = family.get(next).map(|p| p.pid) {
        next += 1;
        for process in table {
            let kin = process.parent == parent || process.session == root.pid;
            if kin && !family.iter().any(|f| f.pid == process.pid) {
                family.push(process.clone());
            }
        }
    }
    family
}

/// Reads the processes of one container: those in a cgroup that the runtime named by its ID.
pub(super) fn read(container: &str) -> Vec<Process> {
    read_at(Path::new("/proc"), container)
}

fn read_at(proc: &Path, container: &str) -> Vec<Process> {
    let Ok(entries) = fs::read_dir(proc) else {
        return Vec::new();
    };
    let dirs = entries.flatten().filter_map(|e| {
        let pid: i32 = e.file_name().to_str()?.parse().ok()?;
        Some((pid, e.path()))
    });
    dirs.filter_map(|(pid, dir)| {
        let cgroups = fs::read_to_string(dir.join("cgroup")).ok()?;
        if !within(&cgroups, container) {
            return None;
        }
        let mut process = parse_stat(pid, &fs::read_to_string(dir.join("stat")).ok()?)?;
        process.command = fs::read(dir.join("cmdline")).ok()?;
        process.command.truncate(LONGEST_COMMAND);
        Some(process)
    })
    .collect()
}

/// Whether `/proc/PID/cgroup` names a cgroup of the container: `ID`, `cri-containerd-ID.scope`,
/// `crio-ID.scope`, or one below it. The monitor beside it (`crio-conmon-ID.scope`) is not in it.
fn within(cgroups: &str, container: &str) -> bool {
    let named = |part: &str| {
        let name = part.strip_suffix(".scope").unwrap_or(part);
        name.strip_suffix(container)
            .is_some_and(|before| !before.contains("conmon"))
    };
    !container.is_empty() && cgroups.lines().any(|line| line.split('/').any(named))
}

/// Nothing for a process that has ended and waits for its parent.
fn parse_stat(pid: i32, stat: &str) -> Option<Process> {
    // A program's name may hold anything, also brackets and spaces.
    let (_, rest) = stat.rsplit_once(") ")?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    if matches!(*fields.first()?, "Z" | "X") {
        return None;
    }
    Some(Process {
        pid,
        parent: fields.get(1)?.parse().ok()?,
        session: fields.get(3)?.parse().ok()?,
        began: Ticks(fields.get(19)?.parse().ok()?),
        command: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHIM: i32 = 1;

    fn exec(id: u64, asked: u64, command: &str) -> Started {
        Started {
            id,
            container: "c".into(),
            command: command.split(' ').map(str::to_owned).collect(),
            asked: Ticks(asked),
            left: None,
        }
    }

    /// Its asker left as well.
    fn left(exec: Started) -> Started {
        let left = Some(Ticks(exec.asked.0 + 100));
        Started { left, ..exec }
    }

    fn process(pid: i32, parent: i32, began: u64, command: &str) -> Process {
        Process {
            pid,
            parent,
            session: if parent == SHIM { pid } else { parent },
            began: Ticks(began),
            command: format!("{}\0", command.replace(' ', "\0")).into_bytes(),
        }
    }

    /// The container's own, and a child of it.
    fn init() -> Vec<Process> {
        vec![
            process(10, SHIM, 5, "sleep 1000"),
            process(11, 10, 150, "sleep 1000"),
        ]
    }

    /// What it is about, the other execs, further processes; the process that is meant, or how many
    /// could be.
    type Case = (&'static str, Vec<Started>, Vec<Process>, Result<i32, usize>);

    #[test]
    fn which_process_an_exec_started() {
        let rival = |asked| vec![exec(1, asked, "sleep 1000")];
        let cases: Vec<Case> = vec![
            ("nothing but what was there", vec![], vec![], Err(0)),
            (
                "its own",
                vec![],
                vec![process(20, SHIM, 100, "sleep 1000")],
                Ok(20),
            ),
            (
                "rounded down by the kernel",
                vec![],
                vec![process(20, SHIM, 99, "sleep 1000")],
                Ok(20),
            ),
            (
                "a shell that became its last command",
                vec![],
                vec![process(20, SHIM, 103, "tail -f x")],
                Ok(20),
            ),
            (
                "began much later: somebody else's",
                vec![],
                vec![process(20, SHIM, 100 + SOON + 1, "tail -f x")],
                Err(0),
            ),
            (
                "two new ones that say nothing",
                vec![],
                vec![
                    process(20, SHIM, 103, "tail -f x"),
                    process(21, SHIM, 104, "tail -f y"),
                ],
                Err(2),
            ),
            (
                "another exec's by its command",
                vec![exec(1, 101, "tail -f x")],
                vec![process(20, SHIM, 103, "tail -f x")],
                Err(0),
            ),
            (
                "an older exec whose process is not to be told",
                vec![exec(1, 90, "sh script")],
                vec![process(20, SHIM, 103, "tail -f x")],
                Err(1),
            ),
            (
                "of two equal ones the second, as it was asked for second",
                rival(90),
                vec![
                    process(30, SHIM, 91, "sleep 1000"),
                    process(20, SHIM, 101, "sleep 1000"),
                ],
                Ok(20),
            ),
            (
                "of two equal ones the first",
                rival(120),
                vec![
                    process(30, SHIM, 121, "sleep 1000"),
                    process(20, SHIM, 101, "sleep 1000"),
                ],
                Ok(20),
            ),
            (
                "two equal ones and one process",
                rival(90),
                vec![process(30, SHIM, 101, "sleep 1000")],
                Err(1),
            ),
            (
                "an equal one of somebody unknown",
                vec![],
                vec![
                    process(30, SHIM, 101, "sleep 1000"),
                    process(31, SHIM, 102, "sleep 1000"),
                ],
                Err(2),
            ),
        ];
        check(cases);
    }

    #[test]
    fn what_began_at_the_same_time_is_told_apart_only_when_all_are_to_be_ended() {
        let equal = |id, asked| exec(id, asked, "sleep 1000");
        let script = |id, asked| exec(id, asked, &format!("script {id}"));
        let sleeps = |pid, began| process(pid, SHIM, began, "sleep 1000");
        let shell = |pid, began| process(pid, SHIM, began, "sh x");
        check(vec![
            (
                "asked for first, it may have begun second",
                vec![equal(1, 101)],
                vec![sleeps(20, 103), sleeps(21, 104)],
                Err(2),
            ),
            (
                "asked for second, it may have begun first",
                vec![equal(1, 98)],
                vec![sleeps(20, 103), sleeps(21, 104)],
                Err(2),
            ),
            (
                "asked for in the tick in which the one before began",
                vec![equal(1, 90)],
                vec![sleeps(20, 99), sleeps(21, 104)],
                Err(2),
            ),
            (
                "the next was asked for in the tick in which it began",
                vec![equal(1, 104)],
                vec![sleeps(20, 103), sleeps(21, 105)],
                Err(2),
            ),
            (
                "two at the same time long before it, and its own",
                vec![equal(1, 50), equal(2, 50)],
                vec![sleeps(20, 51), sleeps(21, 51), sleeps(22, 101)],
                Ok(22),
            ),
            (
                "both are to be ended",
                vec![left(equal(1, 101))],
                vec![sleeps(20, 103), sleeps(21, 104)],
                Ok(20),
            ),
            (
                "the other is to be ended and can only have the first",
                vec![left(equal(1, 90))],
                vec![sleeps(20, 95), sleeps(21, 104)],
                Ok(21),
            ),
            (
                "both are to be ended, and one of them ended by itself",
                vec![left(equal(1, 101))],
                vec![sleeps(20, 103)],
                Ok(20),
            ),
            (
                "both are to be ended, and a third process is somebody's",
                vec![left(equal(1, 101))],
                vec![sleeps(20, 103), sleeps(21, 104), sleeps(22, 105)],
                Err(3),
            ),
            (
                "of three, one's asker is still there",
                vec![left(equal(1, 101)), equal(2, 102)],
                vec![sleeps(20, 103), sleeps(21, 103), sleeps(22, 105)],
                Err(3),
            ),
            (
                "of three, one's asker is still there and asked after two had begun",
                vec![left(equal(1, 101)), equal(2, 110)],
                vec![sleeps(20, 103), sleeps(21, 103), sleeps(22, 111)],
                Ok(20),
            ),
            (
                "what began long after the other's asker left is not the other's",
                vec![left(equal(1, 80))],
                vec![sleeps(20, 101), sleeps(21, 180 + LATE + 1)],
                Ok(21),
            ),
            (
                "two scripts that are both to be ended",
                vec![left(script(1, 101))],
                vec![shell(20, 103), shell(21, 104)],
                Ok(20),
            ),
            (
                "two scripts, one of them with its asker",
                vec![script(1, 101)],
                vec![shell(20, 103), shell(21, 104)],
                Err(2),
            ),
            (
                "two scripts that are both to be ended, and somebody's third",
                vec![left(script(1, 101))],
                vec![shell(20, 103), shell(21, 104), shell(22, 105)],
                Err(3),
            ),
            (
                "of two equal ones with askers only one is known by its name",
                vec![exec(1, 101, "tail -f x"), exec(2, 101, "tail -f x")],
                vec![process(20, SHIM, 102, "tail -f x"), shell(21, 103)],
                Err(2),
            ),
        ]);
    }

    #[test]
    fn what_is_being_ended_is_nobodys() {
        let mine = exec(7, 100, "sleep 1000");
        let table = [
            process(20, SHIM, 101, "sleep 1000"),
            process(21, SHIM, 102, "sleep 1000"),
        ];
        let found = started_by(&mine, &[], &table, &[(20, Ticks(101))]);
        assert_eq!(found, Verdict::Found(table[1].clone()));
        let other = started_by(&mine, &[], &table, &[(20, Ticks(99))]);
        assert_eq!(other, Verdict::Unclear(2), "a number that was given again");
    }

    fn check(cases: Vec<Case>) {
        let mine = || left(exec(7, 100, "sleep 1000"));
        for (what, others, extra, want) in cases {
            let table: Vec<Process> = init().into_iter().chain(extra).collect();
            let got = match started_by(&mine(), &others, &table, &[]) {
                Verdict::Found(process) => Ok(process.pid),
                Verdict::None => Err(0),
                Verdict::Unclear(count) => Err(count),
            };
            assert_eq!(got, want, "{what}");
        }
    }

    #[test]
    fn its_children_and_their_sessions_go_with_it_and_nobody_else() {
        let root = process(20, SHIM, 100, "sh");
        let orphan = Process {
            session: 20,
            ..process(23, 10, 120, "in the background")
        };
        let table = [
            init(),
            vec![
                root.clone(),
                process(21, 20, 101, "make"),
                process(22, 21, 102, "cc"),
                orphan,
                process(30, SHIM, 100, "sh"),
            ],
        ]
        .concat();
        let family = with_children(&root, &table);
        let mut pids: Vec<i32> = family.iter().map(|p| p.pid).collect();
        pids.sort_unstable();
        assert_eq!(pids, [20, 21, 22, 23]);
    }

    #[test]
    fn a_container_is_known_by_its_cgroups_name() {
        for (cgroups, want) in [
            ("0::/kubepods/besteffort/podu/abc\n", true),
            ("0::/kubepods.slice/cri-containerd-abc.scope\n", true),
            ("12:pids:/kubepods/podu/abc\n1:name=systemd:/x\n", true),
            ("0::/kubepods.slice/crio-abc.scope/init.scope\n", true),
            ("0::/kubepods.slice/crio-conmon-abc.scope\n", false),
            ("0::/kubepods/podu/abcd\n", false),
            ("0::/\n", false),
        ] {
            assert_eq!(within(cgroups, "abc"), want, "{cgroups}");
            assert!(!within(cgroups, ""), "{cgroups}");
        }
    }

    #[test]
    fn a_line_of_the_kernels_is_read_whatever_the_program_is_called() {
        let line = "20 (a) b) (c) S 1 20 20 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4711 9 9";
        let process = parse_stat(20, line).unwrap();
        assert_eq!((process.parent, process.session), (1, 20));
        assert_eq!(process.began, Ticks(4711));
        assert_eq!(parse_stat(20, &line.replace(" S 1", " Z 1")), None);
        assert_eq!(parse_stat(20, "20 (x"), None);
    }

    #[test]
    fn this_process_is_in_the_table_it_reads() {
        // Whatever the cgroups here are called, the table is read from the real files.
        let pid = i32::try_from(std::process::id()).unwrap();
        let stat = fs::read_to_string("/proc/self/stat").unwrap();
        let process = parse_stat(pid, &stat).unwrap();
        assert!(process.began <= Ticks::now());
        assert!(Ticks::now().0 - process.began.0 < 3600 * USER_HZ);
    }
}
