//! One request to the admin socket.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt as _;
use http::header::HOST;
use http::{HeaderValue, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt as _, Empty, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

use super::CtlError;

/// Until an answer begins; the container runtime may be asked meanwhile.
const ANSWER: Duration = Duration::from_secs(30);
/// A list of all Pods of a full node is well below it.
const LONGEST_DOCUMENT: usize = 32 << 20;
/// A refusal is a sentence.
const LONGEST_REFUSAL: usize = 64 * 1024;

/// Who is asked.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    pub fn new(socket: &Path) -> Self {
        let socket = socket.to_owned();
        Self { socket }
    }

    pub(super) async fn connect(&self) -> Result<UnixStream, CtlError> {
        let connected = UnixStream::connect(&self.socket).await;
        connected.map_err(|e| CtlError::Connect(self.socket.clone(), e))
    }

    /// A whole document.
    pub(crate) async fn document(&self, path: &str) -> Result<Bytes, CtlError> {
        let mut document = Vec::new();
        let asked = self.read(path, |piece| {
            if document.len() + piece.len() > LONGEST_DOCUMENT {
                return Err(CtlError::TooLong(LONGEST_DOCUMENT));
            }
            document.extend_from_slice(&piece);
            Ok(())
        });
        match tokio::time::timeout(ANSWER, asked).await {
            Ok(done) => done?,
            Err(_) => return Err(CtlError::Deadline),
        }
        Ok(document.into())
    }

    /// Reads an answer piece by piece, for as long as it lasts.
    pub(super) async fn read(
        &self,
        path: &str,
        mut take: impl FnMut(Bytes) -> Result<(), CtlError>,
    ) -> Result<(), CtlError> {
        let stream = TokioIo::new(self.connect().await?);
        let (mut sender, connection) = http1::handshake(stream).await?;
        let mut connection = std::pin::pin!(connection.fuse());
        let work = async {
            let asked = sender.send_request(request(path)?);
            let response = tokio::time::timeout(ANSWER, asked).await;
            let response = response.map_err(|_| CtlError::Deadline)??;
            if response.status() != StatusCode::OK {
                return Err(refused(response).await);
            }
            let mut body = response.into_body();
            while let Some(frame) = body.frame().await {
                if let Ok(piece) = frame?.into_data() {
                    take(piece)?;
                }
            }
            Ok(())
        };
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                biased;
                done = &mut work => return done,
                // Its end is told to `work`.
                _ = &mut connection => {}
            }
        }
    }
}

fn request(path: &str) -> Result<Request<Empty<Bytes>>, CtlError> {
    let mut request = Request::new(Empty::new());
    let uri = Uri::try_from(path);
    *request.uri_mut() = uri.map_err(|_| CtlError::Refused(format!("{path:?} is no path")))?;
    let host = HeaderValue::from_static("edgecore");
    request.headers_mut().insert(HOST, host);
    Ok(request)
}

async fn refused(response: Response<Incoming>) -> CtlError {
    let status = response.status();
    let body = Limited::new(response.into_body(), LONGEST_REFUSAL);
    match tokio::time::timeout(ANSWER, body.collect()).await {
        Ok(Ok(body)) => {
            let text = String::from_utf8_lossy(&body.to_bytes()).trim().to_owned();
            let text = if text.is_empty() {
                status.to_string()
            } else {
                text
            };
            CtlError::Refused(text)
        }
        Ok(Err(error)) if error.is::<LengthLimitError>() => CtlError::TooLong(LONGEST_REFUSAL),
        Ok(Err(_)) | Err(_) => CtlError::Refused(status.to_string()),
    }
}
