//! Where the API server is and who asks: a kubeconfig, or the files of a Pod's ServiceAccount.

use std::path::{Path, PathBuf};

use kube::Client;
use kube::Config;
use kube::client::ConfigExt;
use kube::config::{AuthInfo, KubeConfigOptions, Kubeconfig};

use super::KubeError;

/// Where Kubernetes mounts a Pod's ServiceAccount token.
const IN_CLUSTER_TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";

/// A way to the API server.
pub struct Access {
    config: Config,
    token_file: Option<PathBuf>,
}

impl Access {
    /// The given kubeconfig; else the ServiceAccount of the Pod that this process runs in; else
    /// what kubectl would use (`KUBECONFIG`, `~/.kube/config`).
    pub async fn find(kubeconfig: Option<&Path>) -> Result<Self, KubeError> {
        if let Some(path) = kubeconfig {
            return Self::kubeconfig(path).await;
        }
        if let Ok(config) = Config::incluster() {
            return Ok(Self {
                config,
                token_file: Some(PathBuf::from(IN_CLUSTER_TOKEN)),
            });
        }
        let file = Kubeconfig::read().map_err(|e| KubeError::NoAccess(Box::new(e)))?;
        Self::from_file(file, "of the environment").await
    }

    async fn kubeconfig(path: &Path) -> Result<Self, KubeError> {
        let shown = path.display().to_string();
        let file = Kubeconfig::read_from(path).map_err(|e| KubeError::Kubeconfig {
            path: shown.clone(),
            source: Box::new(e),
        })?;
        Self::from_file(file, &shown).await
    }

    async fn from_file(file: Kubeconfig, path: &str) -> Result<Self, KubeError> {
        let clusters = file.clusters.iter().filter_map(|c| c.cluster.as_ref());
        if clusters
            .into_iter()
            .any(|c| c.proxy_url.as_ref().is_some_and(|url| !url.is_empty()))
        {
            return Err(KubeError::Proxy { path: path.into() });
        }
        let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await;
        let mut config = config.map_err(|e| KubeError::Kubeconfig {
            path: path.into(),
            source: Box::new(e),
        })?;
        // A proxy in the environment is for the way out; the API server is dialled directly.
        config.proxy_url = None;
        Ok(Self {
            config,
            token_file: None,
        })
    }

    /// A client of the kubeconfig's own user: for `install`, `token` and `node`, and to ask for the
    /// ServiceAccount's token.
    pub fn user(&self) -> Result<Client, KubeError> {
        Client::try_from(self.config.clone()).map_err(|source| self.tls_error(source))
    }

    /// The API server's address.
    pub fn server(&self) -> &http::Uri {
        &self.config.cluster_url
    }

    /// The file that holds CloudCore's token, in a cluster.
    pub(crate) fn token_file(&self) -> Option<&Path> {
        self.token_file.as_deref()
    }

    /// TLS that trusts what the kubeconfig trusts and shows none of its credentials.
    pub(crate) fn anonymous_tls(&self) -> Result<rustls::ClientConfig, KubeError> {
        let mut config = self.config.clone();
        config.auth_info = AuthInfo::default();
        config
            .rustls_client_config()
            .map_err(|source| self.tls_error(source))
    }

    pub(crate) fn tls_server_name(&self) -> Option<&str> {
        self.config.tls_server_name.as_deref()
    }

    fn tls_error(&self, source: kube::Error) -> KubeError {
        KubeError::Tls {
            server: self.server().to_string(),
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read(text: &str) -> Result<Access, KubeError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("k");
        std::fs::write(&path, text).unwrap();
        Access::find(Some(&path)).await
    }

    const GOOD: &str = r#"{"apiVersion": "v1", "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": "https://192.0.2.1:6443/x"}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x"}"#;

    #[tokio::test]
    async fn a_kubeconfig_names_the_server() {
        let access = read(GOOD).await.unwrap();
        assert_eq!(access.server().to_string(), "https://192.0.2.1:6443/x");
        assert!(access.token_file().is_none());
    }

    #[tokio::test]
    async fn a_kubeconfig_that_cannot_be_used_is_named() {
        let proxied = GOOD.replace("\"server\"", "\"proxy-url\": \"http://p:1\", \"server\"");
        for (text, want) in [
            (proxied.as_str(), "proxy-url"),
            ("{}", "cannot be used"),
            ("nonsense: [", "cannot be used"),
            (&GOOD.replace("\"x\"}", "\"y\"}"), "cannot be used"),
        ] {
            let error = read(text).await.err().unwrap().to_string();
            assert!(error.contains(want), "{text}: {error}");
        }
        let none = Access::find(Some(Path::new("/nonexistent/k")))
            .await
            .err()
            .unwrap();
        assert!(none.to_string().contains("/nonexistent/k"), "{none}");
    }
}
