//! Private engine per test, images from real distributions, peers as clients
