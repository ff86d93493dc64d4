//! What survives a restart: sealed token and subscription, the wish, the last endpoint, the user id.
