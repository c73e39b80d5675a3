// What the operators ask of CUDA's runtime, answered for tensors on the CPU. The build renames the calls to these.

#include <cstdint>

extern "C" {
int32_t emulated_current_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
int32_t emulated_create_guard(int32_t, void** guard) {
  static char none;
  *guard = &none;
  return 0;
}
int32_t emulated_delete_guard(void*) { return 0; }
void emulated_check(int32_t, const char*, const char*, uint32_t, bool, char** message) { *message = nullptr; }
void emulated_free(char*) {}
}
