// SPDX-License-Identifier: GPL-2.0-only
/*
 * This module replaces a driver in tests of the checks before publishing. It
 * shows a version in /proc/driver/nvidia/version, as NVIDIA's driver does. When
 * the kernel loads the module, the module makes the fault that a macro of the
 * compiler's command line chooses: DEED_OOPS or DEED_WARN, or none.
 */
#include <linux/init.h>
#include <linux/module.h>
#include <linux/proc_fs.h>
#include <linux/seq_file.h>

static int version_show(struct seq_file *m, void *v)
{
	seq_puts(m, "NVRM version: stand-in  1.2.3  today\n");
	return 0;
}

static int __init standin_init(void)
{
#if defined(DEED_OOPS)
	*(volatile int *)0x10 = 1;
#elif defined(DEED_WARN)
	WARN(1, "a stand-in's bad deed\n");
#endif
	if (!proc_mkdir("driver/nvidia", NULL))
		return -ENOMEM;
	if (!proc_create_single("driver/nvidia/version", 0, NULL, version_show)) {
		remove_proc_entry("driver/nvidia", NULL);
		return -ENOMEM;
	}
	return 0;
}

static void __exit standin_exit(void)
{
	remove_proc_subtree("driver/nvidia", NULL);
}

module_init(standin_init);
module_exit(standin_exit);
MODULE_DESCRIPTION("Stands in for a driver in tests");
MODULE_VERSION("1.2.3");
MODULE_LICENSE("GPL");
