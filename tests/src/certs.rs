//! A throw-away certificate authority for one test network, made by openssl(1).

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

/// An authority in a directory: `ca.crt`, `ca.key`.
pub struct Authority {
    directory: PathBuf,
}

/// A certificate with its key, both PEM files.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The certificate.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

impl Authority {
    /// Makes an authority; the directory is made when it is not there.
    pub fn create(directory: &Path) -> Result<Self> {
        std::fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
        let authority = Self {
            directory: directory.to_owned(),
        };
        openssl(
            &authority.directory,
            &[
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-nodes",
                "-days",
                "2",
                "-subj",
                "/CN=DVPN test authority",
                "-keyout",
                "ca.key",
                "-out",
                "ca.crt",
                "-addext",
                "basicConstraints=critical,CA:TRUE",
                "-addext",
                "keyUsage=critical,keyCertSign,cRLSign",
            ],
        )?;
        Ok(authority)
    }

    /// The certificate to trust.
    pub fn certificate(&self) -> PathBuf {
        self.directory.join("ca.crt")
    }

    /// Makes a server certificate for these addresses and names.
    pub fn issue(&self, name: &str, addresses: &[IpAddr], names: &[&str]) -> Result<Identity> {
        let subjects: Vec<String> = addresses
            .iter()
            .map(|address| format!("IP:{address}"))
            .chain(names.iter().map(|name| format!("DNS:{name}")))
            .collect();
        let (key, certificate) = (format!("{name}.key"), format!("{name}.crt"));
        openssl(
            &self.directory,
            &[
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-nodes",
                "-days",
                "2",
                "-subj",
                &format!("/CN={name}"),
                "-keyout",
                &key,
                "-out",
                &certificate,
                "-CA",
                "ca.crt",
                "-CAkey",
                "ca.key",
                "-addext",
                &format!("subjectAltName={}", subjects.join(",")),
                "-addext",
                "basicConstraints=critical,CA:FALSE",
                "-addext",
                "extendedKeyUsage=serverAuth",
            ],
        )?;
        Ok(Identity {
            certificate: self.directory.join(certificate),
            key: self.directory.join(key),
        })
    }
}

fn openssl(directory: &Path, arguments: &[&str]) -> Result<()> {
    let output = Command::new("openssl")
        .args(arguments)
        .current_dir(directory)
        .stdin(Stdio::null())
        .output()
        .context("running openssl: install it")?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "openssl {} failed: {}",
        arguments.join(" "),
        error.trim()
    );
    Ok(())
}
