//! The provider side of a node.
