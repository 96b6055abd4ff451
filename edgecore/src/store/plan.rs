//! What to do with the two copies at open. Pure: decides from what was read, touches nothing.

use super::snapshot::Found;

/// What is known of the database after it was opened and checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum DatabaseState {
    Unusable(String),
    Empty,
    Intact { seq: u64, incarnation: [u8; 16] },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Plan {
    /// Neither copy exists: a new store.
    Fresh,
    /// Both fit: the batches that only the snapshot has are applied to the database.
    Replay,
    /// The database is moved aside and made again from the snapshot.
    Rebuild(String),
    /// The snapshot is made again from the database.
    Rewrite(String),
    /// Neither copy is whole: what is intact of the snapshot makes a new database.
    Salvage(String),
}

/// The database of a crash is behind the snapshot, never ahead of it, since the snapshot is synced
/// first; and it is never behind the snapshot's base, which is written behind a checkpoint.
pub(super) fn plan(database: DatabaseState, snapshot: Option<Found>) -> Plan {
    let whole = snapshot.filter(|s| !s.base_broken);
    match (database, whole) {
        (DatabaseState::Unusable(why), Some(_)) => Plan::Rebuild(why),
        (DatabaseState::Unusable(why), None) => Plan::Salvage(why),
        (DatabaseState::Empty, None) if snapshot.is_none() => Plan::Fresh,
        (DatabaseState::Empty, None) => Plan::Salvage("both copies are damaged".into()),
        (DatabaseState::Empty, Some(_)) => Plan::Rebuild("it is empty".into()),
        (DatabaseState::Intact { .. }, None) => Plan::Rewrite(match snapshot {
            Some(_) => "its base is damaged".into(),
            None => "it is missing".into(),
        }),
        (DatabaseState::Intact { seq, incarnation }, Some(s)) => {
            if seq < s.head.base_seq {
                Plan::Rebuild("it lost batches that were synced".into())
            } else if incarnation != s.head.incarnation {
                Plan::Rewrite("it belongs to another incarnation".into())
            } else if s.last_seq < seq {
                Plan::Rewrite("it lost its end".into())
            } else {
                Plan::Replay
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::snapshot::Head;
    use super::*;

    fn found(base_seq: u64, last_seq: u64, base_broken: bool) -> Option<Found> {
        Some(Found {
            head: Head {
                version: 1,
                incarnation: [1; 16],
                base_seq,
            },
            last_seq,
            base_broken,
            torn: false,
        })
    }

    #[test]
    fn each_state_of_the_two_copies_has_its_answer() {
        let at = |seq| DatabaseState::Intact {
            seq,
            incarnation: [1; 16],
        };
        let other = DatabaseState::Intact {
            seq: 5,
            incarnation: [2; 16],
        };
        let bad = || DatabaseState::Unusable("x".into());
        let cases = [
            (DatabaseState::Empty, None, "Fresh"),
            (DatabaseState::Empty, found(3, 5, false), "Rebuild"),
            (DatabaseState::Empty, found(3, 5, true), "Salvage"),
            (at(3), found(3, 5, false), "Replay"),
            (at(5), found(3, 5, false), "Replay"),
            (at(2), found(3, 5, false), "Rebuild"),
            (at(6), found(3, 5, false), "Rewrite"),
            (at(5), found(3, 4, true), "Rewrite"),
            (at(5), None, "Rewrite"),
            (other, found(3, 5, false), "Rewrite"),
            (bad(), found(3, 5, false), "Rebuild"),
            (bad(), found(3, 5, true), "Salvage"),
            (bad(), None, "Salvage"),
        ];
        for (database, snapshot, expected) in cases {
            let got = format!("{:?}", plan(database.clone(), snapshot));
            assert!(
                got.starts_with(expected),
                "{database:?} {snapshot:?}: {got}"
            );
        }
    }
}
