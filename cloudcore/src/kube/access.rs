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
        let config = Config::from_kubeconfig(&KubeConfigOptions::default())
            .await
            .map_err(|e| KubeError::NoAccess(Box::new(e)))?;
        Ok(Self {
            config,
            token_file: None,
        })
    }

    async fn kubeconfig(path: &Path) -> Result<Self, KubeError> {
        let failed = |source| KubeError::Kubeconfig {
            path: path.display().to_string(),
            source: Box::new(source),
        };
        let file = Kubeconfig::read_from(path).map_err(failed)?;
        let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
            .await
            .map_err(failed)?;
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

    pub(crate) fn server(&self) -> &http::Uri {
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
