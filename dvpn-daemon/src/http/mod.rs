//! HTTPS clients with limits: size, time, version, no redirects, no proxy environment.
