// What a server runs best with. Plain JavaScript that runs on Node 18 and later.

// glibc keeps what large buffers leave free in an arena a thread: two arenas, and memory given back from 128 KB on, are a
// third less for a server that has loaded much.
const glibcTunables = "glibc.malloc.arena_max=2:glibc.malloc.mmap_threshold=131072:glibc.malloc.trim_threshold=131072"

/** Environment that Node reads as it starts. */
export const serverEnvironment = process.platform === "linux" ? { GLIBC_TUNABLES: glibcTunables } : {}

// A young generation of 8 MB a space instead of 16: a server's garbage is short-lived, and the memory is better used for
// vectors.
export const nodeFlags = ["--max-semi-space-size=8"]
