test {
    _ = @import("client/files_test.zig");
    _ = @import("client/path.zig");
    _ = @import("client/producer_test.zig");
    _ = @import("client/session_test.zig");
    _ = @import("header_client_test.zig");
}
