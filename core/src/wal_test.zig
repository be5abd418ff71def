test {
    _ = @import("format/wal.zig");
    _ = @import("engine/wal/storage.zig");
    _ = @import("engine/wal/group.zig");
    _ = @import("engine/wal/log.zig");
    _ = @import("engine/wal/reader.zig");
    _ = @import("engine/wal/recovery.zig");
    _ = @import("engine/wal/log_test.zig");
    _ = @import("engine/wal/unsynced_test.zig");
    _ = @import("engine/wal/damage_test.zig");
    _ = @import("testing/simulated_disk.zig");
}
