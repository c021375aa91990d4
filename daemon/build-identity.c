/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "daemon/build-identity.h"

#include <elf.h>
#include <errno.h>
#include <link.h>
#include <openssl/evp.h>
#include <string.h>
#include <sys/random.h>

#include "base/checked.h"

#define ID_BYTES_MAX 64u

struct build_id {
    uint8_t bytes[ID_BYTES_MAX];
    size_t n;
};

/* One segment of notes, each padded to the segment's alignment. */
static void look_at_notes(const char *at, size_t left, size_t align, struct build_id *ret)
{
    ElfW(Nhdr) h;

    while (left >= sizeof(h)) {
        size_t name, all;

        memcpy(&h, at, sizeof(h));
        name = ALIGN_UP(sizeof(h) + h.n_namesz, align);
        all = ALIGN_UP(name + h.n_descsz, align);
        if (name > left || h.n_descsz > left - name)
            return;
        if (h.n_type == NT_GNU_BUILD_ID && h.n_namesz == sizeof("GNU") &&
            memcmp(at + sizeof(h), "GNU", sizeof("GNU")) == 0 && h.n_descsz <= ID_BYTES_MAX) {
            memcpy(ret->bytes, at + name, h.n_descsz);
            ret->n = h.n_descsz;
        }
        if (all >= left)
            return;
        at += all;
        left -= all;
    }
}

/* The first object is the program. */
static int look_at_program(struct dl_phdr_info *info, size_t size, void *userdata)
{
    (void)size;
    for (unsigned i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *p = &info->dlpi_phdr[i];

        if (p->p_type == PT_NOTE)
            look_at_notes((const char *)(uintptr_t)(info->dlpi_addr + p->p_vaddr),
                          (size_t)p->p_memsz, p->p_align == 8 ? 8 : 4, userdata);
    }
    return 1;
}

int build_identity(const uint8_t model[BUILD_IDENTITY_BYTES], uint8_t ret[BUILD_IDENTITY_BYTES])
{
    uint8_t all[BUILD_IDENTITY_BYTES + sizeof(LLMD_VERSION) + ID_BYTES_MAX];
    struct build_id id = {0};
    size_t n = BUILD_IDENTITY_BYTES;

    (void)dl_iterate_phdr(look_at_program, &id);
    if (id.n == 0) {
        id.n = BUILD_IDENTITY_BYTES;
        if (getrandom(id.bytes, id.n, 0) != (ssize_t)id.n)
            return -EIO;
    }
    memcpy(all, model, n);
    memcpy(all + n, LLMD_VERSION, sizeof(LLMD_VERSION));
    n += sizeof(LLMD_VERSION);
    memcpy(all + n, id.bytes, id.n);
    n += id.n;
    return EVP_Digest(all, n, ret, NULL, EVP_sha256(), NULL) == 1 ? 0 : -EIO;
}
