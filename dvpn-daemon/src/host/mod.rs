//! The only module that changes the machine. It executes no tc, nft, ip or wg.
