//! The tier `netns`: whole-system tests with real processes in network namespaces. Needs root; no test skips itself.
//!
//! | module | shows |
//! |---|---|
//! | `lab` | that the local network does what it says |
//! | `blocked` | while everything is blocked a program is told so at once |
//! | `both` | a node that is provider and client at once |
//! | `chain` | the whole chain, and that the nearest provider is taken |
//! | `payment` | what does not count as paid |
//! | `control` | the D-Bus interface: who is served, what is shown and announced |
//! | `contract` | a pool and a provider that speak only the plain contract |
//! | `device` | device mode and its kill switch: nothing passes beside the tunnel |
//! | `failover` | what happens when a provider dies, and when it does not |
//! | `fallback` | what the orchestrator does when the pool fails |
//! | `owner` | a provider's hours and its month's volume, over crashes too |
//! | `one_click` | the local network that a newcomer brings up: whole again after anything in it was killed |
//! | `leak_test` | the leak test on demand: it sees no leak where none is, and each that is |
//! | `measuring` | the line is measured at the pool |
//! | `leaks` | nothing passes outside the tunnel |
//! | `footprint` | memory, start, programs executed, what a crash leaves |
//! | `kills` | pool, provider and client killed at random points of everything they do together |
//! | `portal` | a network that wants a login: it is told, and lets one user's browser out for that and nothing else |
//! | `release` | a connection that ends while the pool is down is given back later |
//! | `renewal` | a fresh key under a running tunnel, without a lost packet, also when the pool's answer is lost |
//! | `rotation` | the pool changes its key under a running tunnel |
//! | `hostile` | a pool that turns hostile |

mod blocked;
mod both;
mod chain;
mod contract;
mod control;
mod counterpart;
mod database;
mod device;
mod failover;
mod fallback;
mod footprint;
mod hostile;
mod kills;
mod lab;
mod leak_test;
mod leaks;
mod measuring;
mod one_click;
mod owner;
mod payment;
mod portal;
mod release;
mod renewal;
mod rotation;
