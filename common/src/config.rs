//! Configuration files: YAML into a struct, or one sentence that says which key is wrong and what
//! was probably meant. Reads files; never applies defaults, which are the struct's.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

/// A configuration file is a page of text; a larger one is a mistake.
const MAX_FILE: u64 = 1 << 20;

/// Letters of an unknown key that are shown, and compared.
const MAX_SHOWN: usize = 80;

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("configuration file {0} cannot be read")]
    Read(PathBuf, #[source] std::io::Error),
    #[error("configuration file {0} is larger than 1 MiB")]
    TooLarge(PathBuf),
    #[error("configuration file {file}: there is no key {key:?}{}", hint(.nearest, .known))]
    UnknownKey {
        file: PathBuf,
        key: String,
        nearest: Option<String>,
        known: Vec<String>,
    },
    #[error("configuration file {file}: {problem}")]
    Invalid { file: PathBuf, problem: String },
}

fn hint(nearest: &Option<String>, known: &[String]) -> String {
    match nearest {
        Some(name) => format!("; did you mean {name:?}?"),
        None => format!("; the keys are {}", known.join(", ")),
    }
}

/// Reads `T` from a YAML file. `T` should `deny_unknown_fields`; an empty file is `T` from `{}`.
pub fn load<T: DeserializeOwned>(file: &Path) -> Result<T, ConfigError> {
    parse(file, &text(file)?)
}

/// The text of a configuration file.
pub fn text(file: &Path) -> Result<String, ConfigError> {
    let read = |e| ConfigError::Read(file.into(), e);
    if std::fs::metadata(file).map_err(read)?.len() > MAX_FILE {
        return Err(ConfigError::TooLarge(file.into()));
    }
    std::fs::read_to_string(file).map_err(read)
}

/// `T` from the text of a file; the path is for the errors.
pub fn parse<T: DeserializeOwned>(file: &Path, text: &str) -> Result<T, ConfigError> {
    let empty = text
        .lines()
        .all(|l| l.trim().is_empty() || l.trim_start().starts_with('#'));
    let text = if empty { "{}" } else { text };
    serde_saphyr::from_str(text).map_err(|e| explain(file, text, e.without_snippet()))
}

fn explain(file: &Path, text: &str, error: &serde_saphyr::Error) -> ConfigError {
    let file = file.to_owned();
    match error {
        serde_saphyr::Error::SerdeUnknownField {
            field, expected, ..
        } => {
            let known: Vec<&str> = expected.to_vec();
            unknown_key(&file, field, &known)
        }
        other => {
            let said = other.to_string();
            let problem = said.lines().next().unwrap_or_default();
            let problem = match key_at(text, other) {
                Some(key) => format!("{key}: {problem}"),
                None => problem.to_owned(),
            };
            ConfigError::Invalid { file, problem }
        }
    }
}

/// The key on the line that an error points at.
fn key_at<'t>(text: &'t str, error: &serde_saphyr::Error) -> Option<&'t str> {
    let line = usize::try_from(error.location()?.line()).ok()?;
    let (key, _) = text.lines().nth(line.checked_sub(1)?)?.split_once(':')?;
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    let key = key.trim();
    (!key.is_empty() && key.chars().all(plain)).then_some(key)
}

/// The error for a key that a file may not have: with the name that was probably meant.
pub fn unknown_key(file: &Path, key: &str, known: &[&str]) -> ConfigError {
    let key: String = key.chars().take(MAX_SHOWN).collect();
    ConfigError::UnknownKey {
        file: file.to_owned(),
        nearest: nearest(&key, known),
        known: known.iter().map(ToString::to_string).collect(),
        key,
    }
}

/// The known name within a third of the letters of `key`; case, hyphens and underscores aside.
pub fn nearest(key: &str, known: &[&str]) -> Option<String> {
    let plain = |name: &str| name.to_lowercase().replace(['-', '_'], "");
    let wanted = plain(key);
    let known = known.iter().copied();
    let (away, name) = known
        .map(|name| (distance(&wanted, &plain(name)), name))
        .min()?;
    (away <= key.len().div_ceil(3)).then(|| name.to_owned())
}

/// Levenshtein's distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut corner = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = corner + usize::from(x != *y);
            corner = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(corner + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default, PartialEq, serde::Deserialize)]
    #[serde(deny_unknown_fields, default, rename_all = "camelCase")]
    struct Sample {
        listen: Option<String>,
        data_dir: Option<String>,
        grace_days: Option<u32>,
    }

    fn sample(text: &str) -> Result<Sample, String> {
        parse(Path::new("edge.yaml"), text).map_err(|e: ConfigError| e.to_string())
    }

    #[test]
    fn a_file_gives_its_values() {
        let got = sample("listen: 0.0.0.0:10000\ngraceDays: 7\n").unwrap();
        assert_eq!(got.grace_days, Some(7));
        assert_eq!(sample("# nothing\n"), Ok(Sample::default()));
    }

    #[test]
    fn an_unknown_key_names_the_nearest() {
        assert_eq!(
            sample("dataDri: /x\n").unwrap_err(),
            "configuration file edge.yaml: there is no key \"dataDri\"; did you mean \"dataDir\"?"
        );
        assert!(
            sample("data-dir: /x\n")
                .unwrap_err()
                .ends_with("did you mean \"dataDir\"?")
        );
        assert!(
            sample("colour: red\n")
                .unwrap_err()
                .contains("the keys are listen, dataDir")
        );
    }

    #[test]
    fn a_mistyped_value_is_refused_with_its_place() {
        let error = sample("listen: x\ngraceDays: soon\n").unwrap_err();
        assert!(
            error.contains("edge.yaml: graceDays: ") && error.contains("line 2"),
            "{error}"
        );
    }
}
