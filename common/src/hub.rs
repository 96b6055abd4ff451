//! The hub: how a cloud and an edge keep one another's state, over one connection.
