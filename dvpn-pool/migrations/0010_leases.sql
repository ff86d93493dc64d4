-- Nodes that are never listed: only the orchestrator hands them out.
CREATE TABLE standby (
    node_id TEXT PRIMARY KEY REFERENCES node (id) ON DELETE CASCADE
) STRICT;

-- A lease is a short approval with a name; it lasts as long as the approval of the same client at the same node.
CREATE TABLE lease (
    id         TEXT PRIMARY KEY,
    token_hash BLOB NOT NULL UNIQUE,
    node_id    TEXT NOT NULL,
    client_key BLOB NOT NULL
) STRICT;
