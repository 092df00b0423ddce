//! How long is waited for what must come.

use std::time::Duration;

/// Ends a wait for something that does not come: a hang. A judge looks at progress, and never at the speed of a
/// machine, so this is far above what anything takes on a slow and busy one.
pub const PATIENCE: Duration = Duration::from_secs(300);
/// The same for an emulated machine that boots Linux, and for a build.
pub const LONG_PATIENCE: Duration = Duration::from_secs(1200);
