/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* `llm-bench load`: argv[0] is "load". Returns the exit status. */
int load_main(int argc, char **argv);
