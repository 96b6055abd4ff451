//! The words of the disk format: tables, keys, the version and the way from one version to the next.
//!
//! Owns the numbers that are written to disk. They only grow: a table's number, once shipped, keeps
//! its meaning. Never: I/O.

use std::fmt;

use super::StoreError;

/// The version that this program writes. A step in [`MIGRATIONS`] leads to it from each older one.
pub(super) const VERSION: u32 = 1;

/// Step `i` turns a store of version `i + 1` into one of version `i + 2`: it looks at one record
/// and says what becomes of it. The engine applies all answers of a step in one batch with the new
/// version number, so that a crash leaves the old version or the new one.
pub(super) const MIGRATIONS: [Migration; (VERSION - 1) as usize] = [];

pub(super) type Migration = fn(Table, &[u8], &[u8]) -> Vec<Write>;

/// The steps that lead from `found` to [`VERSION`], oldest first.
pub(super) fn path_from(found: u32) -> Result<&'static [Migration], StoreError> {
    match found {
        1..=VERSION => Ok(&MIGRATIONS[(found - 1) as usize..]),
        0 | VERSION.. => Err(StoreError::Version {
            found,
            supported: VERSION,
        }),
    }
}

/// The number is part of each key on disk. 0 is the engine's own record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Table {
    /// Objects that the cloud wants here, by object key.
    Desired,
    /// Pods whose removal is not finished, by object key.
    Removing,
    /// The latest report of each Pod and of the Node, by object key.
    Reports,
    /// The highest sequence number of each report that the cloud acknowledged.
    Acks,
    /// Events on their way up, by sequence number in hex.
    Events,
    /// Small named values of other modules: link, identity, environment, Pod range.
    Meta,
    /// ServiceAccount tokens by the text of their request.
    Tokens,
    /// Small records of the Pod manager, by `UID/NAME`.
    Local,
    /// What this module knows about its own tables: digests, marks, reserved numbers.
    State,
}

impl Table {
    pub(super) const ALL: [Table; 9] = [
        Table::Desired,
        Table::Removing,
        Table::Reports,
        Table::Acks,
        Table::Events,
        Table::Meta,
        Table::Tokens,
        Table::Local,
        Table::State,
    ];

    pub(super) fn number(self) -> u8 {
        match self {
            Table::Desired => 1,
            Table::Removing => 2,
            Table::Reports => 3,
            Table::Acks => 4,
            Table::Events => 5,
            Table::Meta => 6,
            Table::Tokens => 7,
            Table::Local => 8,
            Table::State => 9,
        }
    }

    pub(super) fn from_number(n: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.number() == n)
    }

    /// Whether a compacted snapshot keeps the table. Events are worth less than the flash they
    /// would be copied to again and again; all else is small and an offline boot is poorer
    /// without it.
    pub(super) fn in_snapshot(self) -> bool {
        match self {
            Table::Events => false,
            Table::Desired
            | Table::Removing
            | Table::Reports
            | Table::Acks
            | Table::Meta
            | Table::Tokens
            | Table::Local
            | Table::State => true,
        }
    }
}

/// One change: `None` removes.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Write {
    pub(super) table: Table,
    pub(super) key: Vec<u8>,
    pub(super) value: Option<Vec<u8>>,
}

impl Write {
    pub(super) fn put(table: Table, key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) -> Self {
        Self {
            table,
            key: key.into(),
            value: Some(value.into()),
        }
    }

    pub(super) fn remove(table: Table, key: impl Into<Vec<u8>>) -> Self {
        Self {
            table,
            key: key.into(),
            value: None,
        }
    }
}

impl fmt::Debug for Write {
    /// Never the value: it may be a Secret's.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = String::from_utf8_lossy(&self.key);
        match &self.value {
            Some(v) => write!(f, "{:?}/{key}: {} bytes", self.table, v.len()),
            None => write!(f, "{:?}/{key}: removed", self.table),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_found_by_its_number_and_no_two_share_one() {
        for table in Table::ALL {
            assert_eq!(Table::from_number(table.number()), Some(table));
        }
        assert_eq!(Table::from_number(0), None);
    }

    #[test]
    fn a_newer_store_is_refused_and_an_older_one_has_a_way() {
        assert!(path_from(VERSION).is_ok_and(<[_]>::is_empty));
        assert!(path_from(1).is_ok_and(|p| p.len() == VERSION as usize - 1));
        let refused = path_from(VERSION + 1).map(<[_]>::len);
        let said = refused.expect_err("newer").to_string();
        assert!(said.contains("newer"), "{said}");
        assert!(path_from(0).is_err());
    }

    #[test]
    fn a_printed_write_shows_no_value() {
        let w = Write::put(Table::Tokens, *b"t", *b"hunter2");
        assert!(!format!("{w:?}").contains("hunter2"));
    }
}
