// lowbit._native: everything of the package that is compiled.

#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_babai(nb::module_& m);
void bind_codec(nb::module_& m);
void bind_checksum(nb::module_& m);
void bind_fields(nb::module_& m);
void bind_grouped(nb::module_& m);
void bind_packed(nb::module_& m);
void bind_product(nb::module_& m);
void bind_reader(nb::module_& m);
void bind_step(nb::module_& m);

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // kernels live as long as the models that hold them, which may be to the end
    bind_babai(m);
    bind_codec(m);
    bind_checksum(m);
    bind_fields(m);
    bind_grouped(m);
    bind_packed(m);
    bind_product(m);
    bind_reader(m);
    bind_step(m);
}
