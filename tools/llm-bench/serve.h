/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* `llm-bench serve`: argv[0] is "serve". Returns the exit status. */
int serve_main(int argc, char **argv);
