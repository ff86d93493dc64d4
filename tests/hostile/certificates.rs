//! Certificates for one test, made by the openssl program: an authority, a stranger's authority, and leaves.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;

/// A folder of PEM files that goes away with the test.
pub(crate) struct Certificates(TempDir);

impl Certificates {
    /// Two authorities: `ca` and `stranger`.
    pub(crate) fn new() -> Self {
        let this = Self(TempDir::new().unwrap());
        for name in ["ca", "stranger"] {
            this.openssl(&format!(
                "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout {name}.key -out {name}.pem \
                 -subj /CN={name} -days 2"
            ));
        }
        this
    }

    pub(crate) fn path(&self, file: &str) -> PathBuf {
        self.0.path().join(file)
    }

    /// A leaf for these names (`IP:127.0.0.1`, `DNS:pool.test`), signed by this authority, valid between two dates
    /// (`YYYYMMDDHHMMSSZ`) or from now on.
    pub(crate) fn leaf(&self, authority: &str, names: &str, dates: Option<(&str, &str)>) -> (PathBuf, PathBuf) {
        std::fs::write(
            self.path("ca.cnf"),
            format!(
                "[ca]\ndefault_ca=one\n[one]\nnew_certs_dir=.\ndatabase=index.txt\nserial=serial\ndefault_md=sha256\n\
                 default_days=2\npolicy=any\nx509_extensions=leaf\nunique_subject=no\n[any]\ncommonName=supplied\n\
                 [leaf]\nsubjectAltName={names}\nbasicConstraints=critical,CA:FALSE\n"
            ),
        )
        .unwrap();
        std::fs::write(self.path("index.txt"), "").unwrap();
        std::fs::write(self.path("serial"), "01\n").unwrap();
        self.openssl(
            "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout leaf.key -out leaf.csr -subj /CN=leaf",
        );
        let dates = dates
            .map(|(from, to)| format!("-startdate {from} -enddate {to}"))
            .unwrap_or_default();
        self.openssl(&format!(
            "ca -batch -notext -config ca.cnf -cert {authority}.pem -keyfile {authority}.key -in leaf.csr -out leaf.pem {dates}"
        ));
        (self.path("leaf.pem"), self.path("leaf.key"))
    }

    fn openssl(&self, arguments: &str) {
        run(Command::new("openssl")
            .args(arguments.split_whitespace())
            .current_dir(self.0.path()));
    }

    pub(crate) fn folder(&self) -> &Path {
        self.0.path()
    }
}

/// Runs a program to its end; its words are shown if it fails.
pub(crate) fn run(command: &mut Command) {
    let output = command.output().expect("the program is installed");
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}
