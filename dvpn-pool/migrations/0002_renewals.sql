-- Renewals, releases, revocation, key rotation. The inner networks grow from /20 to /19, so every approval of before
-- names addresses that are another node's now: they all go, and each client asks again.
UPDATE node SET sequence = sequence + 1 WHERE id IN (SELECT node_id FROM approval);
DROP TABLE approval;

-- listed: 1 once clients were shown the node; such an id is never given to another identity.
-- peers: how many clients count against max_peers; kept by the triggers below.
ALTER TABLE node ADD COLUMN listed INTEGER NOT NULL DEFAULT 0;
ALTER TABLE node ADD COLUMN draining INTEGER NOT NULL DEFAULT 0;
ALTER TABLE node ADD COLUMN max_peers INTEGER;
ALTER TABLE node ADD COLUMN peers INTEGER NOT NULL DEFAULT 0;
UPDATE node SET listed = 1;
CREATE INDEX node_by_listed ON node (listed, approved);

-- renews: the key whose addresses this one takes over; empty again once that one went.
-- remove_at: set once another key renewed this one; it goes then.
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
    renews       BLOB,
    remove_at    INTEGER,
    released     INTEGER NOT NULL DEFAULT 0,
    UNIQUE (node_id, client_key)
) STRICT;
-- One address, one client: two keys share it only while one renews the other.
CREATE UNIQUE INDEX approval_host ON approval (node_id, host) WHERE renews IS NULL;
CREATE INDEX approval_by_token ON approval (token_hash);
CREATE INDEX approval_by_client ON approval (client_key);
CREATE INDEX approval_by_expiry ON approval (expires_at);
CREATE INDEX approval_by_removal ON approval (remove_at) WHERE remove_at IS NOT NULL;
CREATE INDEX approval_by_renewal ON approval (node_id, renews) WHERE renews IS NOT NULL;

CREATE TRIGGER approval_added AFTER INSERT ON approval WHEN NEW.renews IS NULL BEGIN
    UPDATE node SET peers = peers + 1 WHERE id = NEW.node_id;
END;
CREATE TRIGGER approval_took_over AFTER UPDATE OF renews ON approval
    WHEN OLD.renews IS NOT NULL AND NEW.renews IS NULL BEGIN
    UPDATE node SET peers = peers + 1 WHERE id = NEW.node_id;
END;
CREATE TRIGGER approval_removed AFTER DELETE ON approval WHEN OLD.renews IS NULL BEGIN
    UPDATE node SET peers = peers - 1 WHERE id = OLD.node_id;
    UPDATE approval SET renews = NULL WHERE node_id = OLD.node_id AND renews = OLD.client_key;
END;

-- used: 1 from the first verification or approval on; until then its checkout repeats it.
ALTER TABLE token ADD COLUMN used INTEGER NOT NULL DEFAULT 0;
ALTER TABLE token ADD COLUMN revoked_at INTEGER;
ALTER TABLE token ADD COLUMN revoke_reason TEXT;
UPDATE token SET used = 1;
CREATE INDEX token_revoked ON token (hash) WHERE revoked_at IS NOT NULL;

-- delivered: 1 once the token exists; token_hash says which it is, so that it can be repeated and revoked.
ALTER TABLE checkout ADD COLUMN token_hash BLOB;
ALTER TABLE checkout ADD COLUMN revoked_at INTEGER;
ALTER TABLE checkout ADD COLUMN revoke_reason TEXT;

-- How the pool's keys followed each other, oldest first.
CREATE TABLE rotation (
    position  INTEGER PRIMARY KEY,
    from_key  TEXT NOT NULL UNIQUE,
    to_key    TEXT NOT NULL UNIQUE,
    signature TEXT NOT NULL
) STRICT;
