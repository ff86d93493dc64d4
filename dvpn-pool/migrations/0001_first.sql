-- Times are Unix seconds; keys, hashes and signatures are raw bytes.

CREATE TABLE meta (
    name  TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT;

-- The serial of the last approval: it grows for ever, also across restarts.
CREATE TABLE counter (
    name  TEXT PRIMARY KEY,
    value INTEGER NOT NULL
) STRICT;
INSERT INTO counter (name, value) VALUES ('serial', 0);

CREATE TABLE node (
    id            TEXT PRIMARY KEY,
    network_index INTEGER NOT NULL UNIQUE,
    identity      BLOB NOT NULL,
    public_key    BLOB NOT NULL UNIQUE,
    endpoint      TEXT NOT NULL,
    probe         TEXT,
    region        TEXT,
    approved      INTEGER NOT NULL DEFAULT 0,
    sequence      INTEGER NOT NULL DEFAULT 0,
    last_host     INTEGER NOT NULL DEFAULT 4094,
    seen_at       INTEGER NOT NULL
) STRICT;

-- Only the SHA-256 of a token is kept.
CREATE TABLE token (
    hash       BLOB PRIMARY KEY,
    expires_at INTEGER NOT NULL
) STRICT;

CREATE TABLE approval (
    serial       INTEGER PRIMARY KEY,
    token_hash   BLOB NOT NULL REFERENCES token (hash),
    node_id      TEXT NOT NULL REFERENCES node (id),
    client_key   BLOB NOT NULL,
    host         INTEGER NOT NULL,
    expires_at   INTEGER NOT NULL,
    approval     BLOB NOT NULL,
    signature    BLOB NOT NULL,
    acknowledged INTEGER NOT NULL DEFAULT 0,
    UNIQUE (node_id, host),
    UNIQUE (node_id, client_key)
) STRICT;
CREATE INDEX approval_by_token ON approval (token_hash);
CREATE INDEX approval_by_client ON approval (client_key);
CREATE INDEX approval_by_expiry ON approval (expires_at);

-- open: 1 while the quote may still be paid; then no other open quote has its user or its amount.
CREATE TABLE checkout (
    id          TEXT PRIMARY KEY,
    user_id     TEXT NOT NULL,
    amount_sats INTEGER NOT NULL,
    expires_at  INTEGER NOT NULL,
    paid_at     INTEGER,
    delivered   INTEGER NOT NULL DEFAULT 0,
    open        INTEGER NOT NULL DEFAULT 1
) STRICT;
CREATE UNIQUE INDEX checkout_open_user ON checkout (user_id) WHERE open = 1;
CREATE UNIQUE INDEX checkout_open_amount ON checkout (amount_sats) WHERE open = 1;
CREATE INDEX checkout_by_expiry ON checkout (expires_at);
