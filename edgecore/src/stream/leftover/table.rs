//! A container's processes, and which of them an exec started (pure, but for [`read`] and the
//! clock).

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// A process that took another command line than it was asked for is one exec's only if it began
/// this soon after it, in ticks: the asker's streams come first, over a slow link.
const SOON: u64 = 10 * USER_HZ;
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
}

impl Started {
    /// Whether the process can be this one's: `/proc` rounds down.
    fn before(&self, process: &Process) -> bool {
        process.began.0 + 1 >= self.asked.0
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

/// The process that an exec started. `others` are the other execs into the container.
pub fn started_by(mine: &Started, others: &[Started], table: &[Process]) -> Verdict {
    let pids: BTreeSet<i32> = table.iter().map(|p| p.pid).collect();
    let mut roots: Vec<&Process> = table.iter().filter(|p| !pids.contains(&p.parent)).collect();
    roots.sort_by_key(|p| (p.began, p.pid));
    let mut same: Vec<&Started> = others
        .iter()
        .filter(|o| o.command == mine.command)
        .collect();
    same.push(mine);
    same.sort_by_key(|s| (s.asked, s.id));
    let first = same[0];
    let named: Vec<&Process> = roots
        .iter()
        .copied()
        .filter(|p| first.before(p) && mine.named(p))
        .collect();
    if named.iter().any(|p| mine.before(p)) {
        return among_equals(mine, &same, &named);
    }
    among_strangers(mine, others, &roots)
}

/// Equal commands: they began in the order in which they were asked for.
fn among_equals(mine: &Started, same: &[&Started], named: &[&Process]) -> Verdict {
    let rank = same.iter().position(|s| s.id == mine.id);
    match rank.and_then(|rank| named.get(rank)) {
        Some(process) if named.len() == same.len() && mine.before(process) => {
            Verdict::Found((*process).clone())
        }
        Some(_) | None => Verdict::Unclear(named.len()),
    }
}

/// No process has the command line: a script's has its interpreter's, a shell's its last
/// command's. One that is new, began a session as the runtime makes it, and is nobody else's.
fn among_strangers(mine: &Started, others: &[Started], roots: &[&Process]) -> Verdict {
    let fits = |s: &Started, p: &Process| s.before(p) && p.began.0 <= s.asked.0 + SOON;
    let fresh: Vec<&&Process> = roots
        .iter()
        .filter(|p| p.session == p.pid && fits(mine, p))
        .filter(|p| !others.iter().any(|o| o.named(p)))
        .collect();
    let rivals = others.iter().filter(|o| {
        let settled = roots.iter().any(|p| o.before(p) && o.named(p));
        !settled && fresh.iter().any(|p| fits(o, p))
    });
    match (&fresh[..], rivals.count()) {
        ([], _) => Verdict::None,
        ([only], 0) => Verdict::Found((**only).clone()),
        (many, rivals) => Verdict::Unclear(many.len().max(rivals)),
    }
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
        }
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
        let mine = || exec(7, 100, "sleep 1000");
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
        for (what, others, extra, want) in cases {
            let table: Vec<Process> = init().into_iter().chain(extra).collect();
            let got = match started_by(&mine(), &others, &table) {
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
