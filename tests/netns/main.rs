//! The tier `netns`: whole-system tests with real processes in network namespaces. Needs root; no test skips itself.

mod lab;
