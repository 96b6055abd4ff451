//! CloudCore's parts. `app` wires them; `main` is the command line.

pub mod app;
pub mod cli;
pub mod config;
pub mod enroll;
pub mod kube;
pub mod nodes;

/// An error with all its causes on one line.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = words(error);
    let mut next = error.source();
    while let Some(cause) = next {
        let said = words(cause);
        // Some libraries repeat their source's words in their own.
        if !text.contains(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        if is_answer(cause) {
            break;
        }
        next = cause.source();
    }
    text
}

/// An answer of the API server ends the chain: below it there is only the same, spelt out.
fn is_answer(error: &(dyn std::error::Error + 'static)) -> bool {
    matches!(error.downcast_ref(), Some(::kube::Error::Api(_)))
}

fn words(error: &(dyn std::error::Error + 'static)) -> String {
    match error.downcast_ref() {
        Some(::kube::Error::Api(status)) => {
            format!(
                "the API server answered {}: {}",
                status.code, status.message
            )
        }
        Some(_) | None => error.to_string(),
    }
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The bytes that hexadecimal digits stand for; `None` for anything else.
pub(crate) fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    let digit = |b: u8| char::from(b).to_digit(16);
    digits
        .chunks_exact(2)
        .map(|pair| u8::try_from(digit(pair[0])? * 16 + digit(pair[1])?).ok())
        .collect()
}

/// The letters and digits that identities are made of: lower case, none that look alike.
pub(crate) const BASE32: [char; 32] = [
    'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h', 'j', 'k', 'm', 'n', 'p', 'q', 'r', 's', 't', 'u', 'v',
    'w', 'x', 'y', 'z', '2', '3', '4', '5', '6', '7', '8', '9', '0',
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_told_with_its_causes_and_the_servers_own_words() {
        let status = ::kube::core::Status::failure("no such thing", "NotFound").with_code(404);
        let answer = ::kube::Error::Api(Box::new(status));
        let error = crate::kube::KubeError::api("reading Node a")(answer);
        assert_eq!(
            chain(&error),
            "reading Node a failed: the API server answered 404: no such thing"
        );
    }

    #[test]
    fn hexadecimal_digits_are_read_strictly() {
        assert_eq!(unhex(&hex(&[0, 255, 16])), Some(vec![0, 255, 16]));
        for bad in ["0", "0g", "é"] {
            assert_eq!(unhex(bad), None, "{bad}");
        }
    }
}
