//! Small durable values of other modules, each kind in its own table.
//!
//! Every `put` and `remove` is durable when it returns and blocks for one sync, unless its name
//! says `later`. Values never show in `Debug`.

use super::schema::{Table, Write};
use super::{Store, StoreError};

type Result<T> = std::result::Result<T, StoreError>;

/// Single values by name: the link object, the identity's continuation value, the environment, the
/// Pod network's range.
#[derive(Clone)]
pub struct Meta(Store);

/// ServiceAccount tokens by the text of their request, which begins with the Pod's key, so that an
/// expired one still mounts when the cloud is away.
#[derive(Clone)]
pub struct Tokens(Store);

/// The Pod manager's own records per Pod UID: grants, restart back-off, first-seen times.
#[derive(Clone)]
pub struct Local(Store);

impl Store {
    pub fn meta(&self) -> Meta {
        Meta(self.clone())
    }

    pub fn tokens(&self) -> Tokens {
        Tokens(self.clone())
    }

    pub fn local(&self) -> Local {
        Local(self.clone())
    }

    fn remove_by_prefix(&self, table: Table, prefix: &[u8]) -> Result<Vec<Write>> {
        self.unstage(table, prefix);
        let found = self.scan(table, prefix)?.into_iter();
        Ok(found.map(|(key, _)| Write::remove(table, key)).collect())
    }
}

impl Meta {
    pub fn get(&self, name: &str) -> Result<Option<Vec<u8>>> {
        self.0.get(Table::Meta, name.as_bytes())
    }

    pub fn put(&self, name: &str, value: &[u8]) -> Result<()> {
        self.put_all(&[(name, value)])
    }

    /// Several values in one step: after a crash all of them are there or none.
    pub fn put_all(&self, values: &[(&str, &[u8])]) -> Result<()> {
        self.replace(values, &[])
    }

    pub fn remove(&self, name: &str) -> Result<()> {
        self.replace(&[], &[name])
    }

    /// Puts and removals in one step.
    pub fn replace(&self, values: &[(&str, &[u8])], gone: &[&str]) -> Result<()> {
        let puts = values
            .iter()
            .map(|(name, value)| Write::put(Table::Meta, *name, *value));
        let removes = gone.iter().map(|name| Write::remove(Table::Meta, *name));
        self.0.commit(puts.chain(removes).collect())
    }
}

impl Tokens {
    pub fn get(&self, request: &str) -> Result<Option<Vec<u8>>> {
        self.0.get(Table::Tokens, request.as_bytes())
    }

    pub fn put(&self, request: &str, token: &[u8]) -> Result<()> {
        self.0
            .commit(vec![Write::put(Table::Tokens, request, token)])
    }

    /// The tokens of a Pod that is gone. Late, and never waits for a sync: a token that survives a
    /// power cut is removed with the Pod's record.
    pub fn remove_by_prefix(&self, prefix: &str) -> Result<()> {
        let writes = self.0.remove_by_prefix(Table::Tokens, prefix.as_bytes())?;
        self.0.later(writes);
        Ok(())
    }
}

impl Local {
    fn key(uid: &str, name: &str) -> Vec<u8> {
        format!("{uid}/{name}").into_bytes()
    }

    pub fn get(&self, uid: &str, name: &str) -> Result<Option<Vec<u8>>> {
        self.0.get(Table::Local, &Self::key(uid, name))
    }

    /// For a grant: nothing is made before it is durable.
    pub fn put(&self, uid: &str, name: &str, value: &[u8]) -> Result<()> {
        let write = Write::put(Table::Local, Self::key(uid, name), value);
        self.0.commit(vec![write])
    }

    /// For what may be lost in a power cut, such as a restart's back-off.
    pub fn put_later(&self, uid: &str, name: &str, value: &[u8]) {
        let write = Write::put(Table::Local, Self::key(uid, name), value);
        self.0.later(vec![write]);
    }

    /// All records of the Pods there are, by UID and name.
    pub fn all(&self) -> Result<Vec<(String, String, Vec<u8>)>> {
        let found = self.0.scan(Table::Local, &[])?.into_iter();
        let named = found.filter_map(|(key, value)| {
            let text = String::from_utf8(key).ok()?;
            let (uid, name) = text.split_once('/')?;
            Some((uid.to_owned(), name.to_owned(), value))
        });
        Ok(named.collect())
    }

    /// All records of one Pod.
    pub fn remove(&self, uid: &str) -> Result<()> {
        let prefix = format!("{uid}/");
        let writes = self.0.remove_by_prefix(Table::Local, prefix.as_bytes())?;
        self.0.commit(writes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_values_survive_a_restart_and_go_when_told() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(dir.path()).unwrap();
        store
            .meta()
            .put_all(&[("link", b"l"), ("env", b"e")])
            .unwrap();
        store.meta().remove("env").unwrap();
        for request in ["Pod/a/b/1 x", "Pod/a/b/1 y", "Pod/a/b/11 x"] {
            store.tokens().put(request, b"t").unwrap();
        }
        store.local().put("1", "grant", b"g").unwrap();
        store.local().put_later("1", "backoff", b"b");
        store.local().put("11", "grant", b"h").unwrap();
        drop(store);
        let (store, _) = Store::open(dir.path()).unwrap();
        assert_eq!(store.meta().get("link").unwrap(), Some(b"l".to_vec()));
        assert_eq!(store.meta().get("env").unwrap(), None);
        store.tokens().remove_by_prefix("Pod/a/b/1 ").unwrap();
        store.flush().unwrap();
        assert_eq!(store.tokens().get("Pod/a/b/1 y").unwrap(), None);
        assert!(store.tokens().get("Pod/a/b/11 x").unwrap().is_some());
        assert_eq!(
            store.local().get("1", "backoff").unwrap(),
            Some(b"b".to_vec())
        );
        store.local().remove("1").unwrap();
        let left = store.local().all().unwrap();
        assert_eq!(left, [("11".into(), "grant".into(), b"h".to_vec())]);
    }
}
