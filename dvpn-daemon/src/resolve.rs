//! Name resolution through the tunnel.
